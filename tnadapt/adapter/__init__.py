"""Adapters around linear layers: one layer (`OverParamAdapter`), whole models, files, and PEFT's format."""

from tnadapt.adapter.base import LinearAdapter
from tnadapt.adapter.models import add_adapters, find_adapters, load_adapters, merge_adapters, save_adapters
from tnadapt.adapter.pair import OverParamAdapter
from tnadapt.adapter.peft_format import export_peft, import_peft

__all__ = [
    "LinearAdapter",
    "OverParamAdapter",
    "add_adapters",
    "export_peft",
    "find_adapters",
    "import_peft",
    "load_adapters",
    "merge_adapters",
    "save_adapters",
]
