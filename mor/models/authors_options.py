"""Options of the authors' runs (their YAML files) as options of `MoRConfig`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mor.models.schedule import SHARINGS

__all__ = ["is_authors_checkpoint", "mor_options", "read_options"]

_EXAMPLE = "https://github.com/raymin0223/mixture_of_recursions, conf/pretrain"

#: What each section may hold. Others could change the model in a way nothing here knows of.
_KNOWN = {
    "recursive": "enable base_depth num_recursion sharing ln_share initialization",
    "kv_sharing": "enable base_depth num_recursion sharing update_cache",
    "mor": "enable type capacity rand_router router_type z_loss z_coeff temp expert token",
    "mor.expert": "cap_warmup_step router_func alpha sampling include_first coeff gating",
    "mor.token": "bal_warmup_step router_func alpha balancing coeff u gating",
    # Sections above, then what concerns the training run alone.
    "": "recursive kv_sharing relaxation mor model model_config "
    "name wandb wandb_mode wandb_entity wandb_project wandb_run_name wandb_run_id output_dir "
    "tensorboard tensorboard_dir resume_from_checkpoint resume_step dataset weights "
    "total_batch_size per_device_train_batch_size gradient_accumulation_steps "
    "batch_size_rampup_steps max_length add_bos_token global_shuffling local_shuffling tokenizer "
    "model_name_or_path attn_implementation use_pretrained_weights lr_scheduler_type "
    "lr_scheduler_kwargs learning_rate adam_beta1 adam_beta2 weight_decay precision max_grad_norm "
    "num_train_steps stop_steps num_warmup_steps save_interval save_steps fixed_save_steps "
    "save_total_limit logging_steps dataloader_num_workers gradient_checkpointing deepspeed "
    "evaluation",
}


def is_authors_checkpoint(folder: str | Path) -> bool:
    """Whether a directory holds options, or names an architecture, of the authors' code."""
    folder = Path(folder)
    if not folder.is_dir():
        return False
    config = folder / "config.json"
    return bool(_options_files(folder)) or (
        config.is_file() and '"MoRLlamaForCausalLM"' in config.read_text(errors="replace")
    )


def _options_files(folder: Path) -> list[Path]:
    """YAML files of a directory that have the authors' section `recursive`, readable or not."""
    files = [path for path in sorted(folder.glob("*")) if path.suffix in (".yaml", ".yml")]
    return [
        path
        for path in files
        if path.is_file() and re.search(r"^recursive\s*:", path.read_text(errors="replace"), re.M)
    ]


def read_options(folder: Path, config: str | Path | None = None) -> dict[str, Any]:
    """The options of a YAML file of the authors: `config`, or the only one in `folder`.

    Raises:
        ValueError: no such file, or several; not YAML, or not options of theirs.
    """
    path = _options_file(folder, config)
    if not path.is_file():
        raise ValueError(f"authors' options: no file {path}; expected the YAML file of the run")
    try:
        options = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"authors' options: {path} is not YAML: {error}") from error
    if not isinstance(options, dict) or "recursive" not in options:
        raise ValueError(
            f"authors' options: {path} has no section 'recursive'; expected the YAML file that the "
            f"checkpoint was trained with (as in {_EXAMPLE})"
        )
    return options


def _options_file(folder: Path, config: str | Path | None) -> Path:
    if config is not None:
        return Path(config)
    files = _options_files(folder)
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise ValueError(
            f"authors' options: expected one YAML file with the options of the run in "
            f"{folder}, got {names}; name the file to use (config=..., --authors-config FILE)"
        )
    return files[0]


class _Section:
    """A section of the options; every error names the option as the file does."""

    def __init__(self, values: Any, name: str = "") -> None:
        values = {} if values is None else values
        self.values: Mapping[str, Any] = values
        self.prefix = f"{name}." if name else ""
        if not isinstance(values, Mapping):
            raise ValueError(f"authors' options: {name}: expected a section, got {values!r}")
        self.known = set(_KNOWN.get(name, "enable").split())

    def refuse_unknown(self) -> None:
        unknown = [f"{self.prefix}{key}" for key in self.values if key not in self.known]
        if unknown:
            raise ValueError(
                f"authors' options: unknown {', '.join(unknown)}, which could change the model; if "
                "they do not, remove them from a copy of the file"
            )

    def error(self, key: str, expected: str) -> ValueError:
        value = repr(self.values[key]) if key in self.values else "nothing"
        return ValueError(f"authors' options: {self.prefix}{key}: expected {expected}, got {value}")

    def choice(self, key: str, allowed: dict[Any, Any], default: Any) -> Any:
        """Our value for theirs."""
        value = self.values.get(key, default)
        for theirs, ours in allowed.items():
            if value is theirs or (isinstance(value, str) and value == theirs):
                return ours
        names = ", ".join("null" if name is None else str(name).lower() for name in allowed)
        raise self.error(key, f"one of {names}")

    def flag(self, key: str, default: bool = False) -> bool:
        allowed = {True: True, False: False, None: default}
        return bool(self.choice(key, allowed, default))

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if isinstance(value, str):  # YAML 1.1 reads 1e-5, without a point, as a string
            value = _as_float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, "a number")
        return float(value)

    def whole(self, key: str) -> int:
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(key, "a whole number above 0")
        return value


def _as_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


_GATINGS = {"weighted": "weighted", "additive": "additive"}
# Their wide_mlp is as wide as their mlp.
_ROUTERS = {"linear": "linear", "mlp": "mlp", "wide_mlp": "mlp"}


def mor_options(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options of `MoRConfig` for those of the authors; None for a model without recursion.

    Warm-ups are left out: the training they belong to is over, and its counters are not saved.

    Raises:
        ValueError: an option that is unknown, or that no model here has.
    """
    root = _Section(options)
    root.refuse_unknown()
    _Section(options.get("model_config"), "model_config")
    recursive = _Section(options.get("recursive"), "recursive")
    kv_sharing = _Section(options.get("kv_sharing"), "kv_sharing")
    mor = _Section(options.get("mor"), "mor")
    if _Section(options.get("relaxation"), "relaxation").flag("enable"):
        raise ValueError(
            "authors' options: relaxation.enable: expected false, got true; models with adapters "
            "of their own between recursions are not read"
        )
    enabled = recursive.flag("enable")
    for section in (kv_sharing, mor):
        if section.flag("enable"):
            section.refuse_unknown()
            if not enabled:
                raise section.error("enable", "false where recursive.enable is false")
    if not enabled:
        return None
    recursive.refuse_unknown()
    recursions = recursive.whole("num_recursion")
    if recursions == 1 and not mor.flag("enable") and not kv_sharing.flag("enable"):
        return None  # fewer layers, none of them used twice
    if not recursive.flag("ln_share", True):
        raise recursive.error("ln_share", "true (norms of each recursion's own are not read)")
    strategy = "recursion"
    if kv_sharing.flag("enable"):
        strategy = "hybrid" if kv_sharing.flag("update_cache") else "shared"
    common = {
        "num_recursions": recursions,
        "sharing": recursive.choice("sharing", {name: name for name in SHARINGS}, None),
        "kv_strategy": strategy,
        "router": None,
    }
    if not mor.flag("enable"):
        return common
    kind = mor.choice("type", {"expert": "expert", "token": "token"}, None)
    routing = _Section(mor.values.get(kind), f"mor.{kind}")
    routing.refuse_unknown()
    rand = mor.flag("rand_router")
    router_type = mor.choice("router_type", _ROUTERS, "linear")
    common |= {
        "router": kind,
        "router_type": "random" if rand else router_type,
        "router_temperature": mor.number("temp", 1.0),
        "router_gating": routing.choice("gating", _GATINGS, "weighted"),
        "router_z_coef": mor.number("z_coeff") if mor.flag("z_loss") else 0.0,
    }
    if rand:
        common |= {"router_func": "none", "router_alpha": routing.number("alpha", 0.1)}
    return common | (_expert if kind == "expert" else _token)(mor, routing, recursions, rand)


def _expert(mor: _Section, expert: _Section, recursions: int, rand: bool) -> dict[str, Any]:
    aux = {None: None, "aux_loss": "loss", "aux_router": "router"}
    found = {
        "capacities": _capacities(mor, recursions),
        "router_aux": expert.choice("sampling", aux, None),
        "router_aux_coef": expert.number("coeff", 0.001),
    }
    if not rand:
        functions = {"sigmoid": "sigmoid", "tanh": "tanh", None: "none"}
        function = expert.choice("router_func", functions, None)
        # Their code multiplies by alpha only where there is a function.
        alpha = 1.0 if function == "none" else expert.number("alpha")
        found |= {"router_func": function, "router_alpha": alpha}
    return found


def _token(mor: _Section, token: _Section, recursions: int, rand: bool) -> dict[str, Any]:
    kinds = {"loss": "loss", "loss_free": "loss_free", None: None}
    found = {
        "router_balancing": token.choice("balancing", kinds, None),
        "router_balance_coef": token.number("coeff", 0.1),
        "router_bias_update_rate": token.number("u", 0.001),
    }
    if not rand:
        functions = {"softmax": "softmax", None: "softmax", "sigmoid": "sigmoid"}
        function = token.choice("router_func", functions, None)
        alpha = token.number("alpha", 0.1 if function == "sigmoid" else 1.0)
        found |= {"router_func": function, "router_alpha": alpha}
    return found


def _capacities(mor: _Section, recursions: int) -> list[float] | None:
    """`capacity: 1,0.66,0.33`; null is the default of `MoRConfig`."""
    value = mor.values.get("capacity")
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else value
    shares = [_as_float(str(part)) for part in parts] if isinstance(parts, list) else []
    if len(shares) != recursions or None in shares:
        raise mor.error("capacity", f"null or {recursions} numbers, as '1,0.66,0.33'")
    return [share for share in shares if share is not None]
