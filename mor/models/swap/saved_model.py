"""Models that carry what was done to them: saved with it, and loaded by it alone."""

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from mor.models.arguments import refuse_generation_options
from mor.models.derived_class import Derived
from mor.models.swap.settings import caller_of

__all__ = ["SavedWithSettings", "saved_config", "unchanged_config"]

#: In the saved configuration, so that Auto classes refuse what they would load as a dense model.
_SAVED_MODEL_TYPE = "mor_swap"
_DENSE_MODEL_TYPE = "dense_model_type"

_HUB_OPTIONS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "token",
    "revision",
    "create_pr",
    "tags",
)


class SavedWithSettings(Derived):
    """Before the class of a dense model: saves and loads what was done to it, and generates."""

    config: Any
    generation_config: Any

    def put_back(self, settings: dict[str, Any]) -> None:
        """Does to a new dense model what `settings` describe."""
        raise NotImplementedError

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        self.dense_class.__init__(self, config, *args, **kwargs)
        self.put_back(config.mor_swap)
        self.post_init()  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As `mor.load_swapped`: what trainers load a model's checkpoints by."""
        config = saved_config(path, **kwargs) if config is None else config
        return super().from_pretrained(path, *args, config=config, **kwargs)  # type: ignore[misc]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the dense model, in training mode too.

        Raises:
            ValueError: a cache_implementation other than dynamic, or assistant_early_exit.
        """
        refuse_generation_options(self.generation_config, args, kwargs)
        return self.dense_class.generate(self, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        *args: Any,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves the model with a configuration that only `mor.load_swapped` takes."""
        hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if push_to_hub and name in kwargs}
        self.dense_class.save_pretrained(self, save_directory, is_main_process, *args, **kwargs)
        path = Path(save_directory) / "config.json"
        if is_main_process and path.exists():
            values = json.loads(path.read_text(encoding="utf-8"))
            values.pop("keys_to_ignore_at_inference", None)
            if "mor_swap" in values and values["model_type"] != _SAVED_MODEL_TYPE:
                # Not inside mor_swap: Transformers looks for a "model_type" in what a file holds.
                values |= {_DENSE_MODEL_TYPE: values["model_type"], "model_type": _SAVED_MODEL_TYPE}
                text = json.dumps(values, indent=2, sort_keys=True) + "\n"
                path.write_text(text, encoding="utf-8")
        if push_to_hub:  # which saves once more, and uploads
            name = hub.pop("repo_id", None) or Path(save_directory).name
            self.push_to_hub(name, **hub)  # type: ignore[attr-defined]


def saved_config(path: str | Path, **kwargs: Any) -> Any:
    """The dense model's configuration, `mor_swap` in it, that `save_pretrained` wrote.

    Args:
        path: the directory, or a name on the hub.
        **kwargs: of `from_pretrained`, those that say which files among them.

    Raises:
        ValueError: a model that was not swapped.
    """
    values, _ = PreTrainedConfig.get_config_dict(path, **kwargs)
    if not values.get("mor_swap"):
        raise ValueError(f"load_swapped: {path} holds no swapped model (no mor_swap in its config)")
    kind = values.pop(_DENSE_MODEL_TYPE, values["model_type"])
    return CONFIG_MAPPING[kind].from_dict({**values, "model_type": kind})


def unchanged_config(folder: Path) -> Any:
    """The configuration of a saved MoR or dense model.

    Raises:
        ValueError: of a model that `swap` or an `apply_` function changed, or no configuration.
    """
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        changed = values.get("mor_swap")
        config = None if changed else AutoConfig.from_pretrained(folder)
    except Exception as error:  # JSON, configuration: whatever the damage raises
        raise ValueError(f"cannot read the configuration in {folder}: {error}") from error
    if changed:
        raise ValueError(
            f"expected a MoR or a dense model, got one that {caller_of(changed)} changed in "
            f"{folder}; analyzed and served is what mor convert makes of the dense model"
        )
    return config
