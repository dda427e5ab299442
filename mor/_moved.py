"""Module paths of earlier versions, each an alias of the module at its new place."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["NEW_PATHS"]

#: `mor.NAME` of earlier versions, and where it is now.
NEW_PATHS = {
    "callbacks": "mor.training.callbacks",
    "checkpoints": "mor.training.checkpoints",
    "convert": "mor.training.convert",
    "corpus": "mor.data.corpus",
    "demo": "mor.training.demo",
    "depth_page": "mor.analysis.depth_page",
    "distributed": "mor.training.distributed",
    "generate": "mor.training.generate",
    "look": "mor.analysis.look",
    "optim": "mor.training.optim",
    "options": "mor.training.options",
    "run": "mor.training.run",
    "text_files": "mor.data.text_files",
    "trl": "mor.training.trl",
    "viz": "mor.analysis.plots",
}


class _OldPaths(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        moved = fullname.startswith("mor.") and fullname[4:] in NEW_PATHS
        return ModuleSpec(fullname, self) if moved else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(NEW_PATHS[spec.name[4:]])
        spec.loader_state = module.__spec__  # the import system is about to replace it
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_OldPaths())
