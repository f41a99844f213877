"""Settings of the whole suite: one torch thread, and how many examples the generated tests draw.

`TNADAPT_HYPOTHESIS_PROFILE=ci` (the default) draws few examples, always the same; `all` draws many; `mutation` draws those of
`ci` and does not look for a smaller one that fails too.
"""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)

_SLOW_TENSORS = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile("ci", max_examples=8, derandomize=True, deadline=None, suppress_health_check=_SLOW_TENSORS)
settings.register_profile("all", max_examples=150, deadline=None, suppress_health_check=_SLOW_TENSORS)
settings.register_profile("mutation", settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate))
settings.load_profile(os.environ.get("TNADAPT_HYPOTHESIS_PROFILE", "ci"))
