from __future__ import annotations

from collections.abc import Iterator

import pytest

from .ranks import Ranks


@pytest.fixture(scope="package")
def _pools() -> Iterator[dict[int, Ranks]]:
    pools: dict[int, Ranks] = {}
    yield pools
    for ranks in pools.values():
        ranks.close()


def pool(pools: dict[int, Ranks], world: int) -> Ranks:
    if world not in pools or not pools[world].alive:
        pools[world] = Ranks(world)
    return pools[world]


@pytest.fixture
def two(_pools: dict[int, Ranks]) -> Ranks:
    return pool(_pools, 2)


@pytest.fixture
def four(_pools: dict[int, Ranks]) -> Ranks:
    return pool(_pools, 4)


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, _pools: dict[int, Ranks]) -> Ranks:
    return pool(_pools, request.param)
