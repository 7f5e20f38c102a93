"""The fixtures of `tests/reference`, and folders in the layout of published checkpoints."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import numpy as np

REFERENCE = Path(__file__).resolve().parent.parent / "reference"
MODELS = ("llama_mha", "llama_gqa", "mpt")
IN_ATTENTION = (  # where published MPT configs have their settings
    "topk",
    "memory_type",
    "memory_device",
    "mask_by_sim",
    "sim_threshold",
    "tokenizer_all_special_ids",
    "remove_special_ids",
    "use_external_mind_by_layer",
)


@dataclass(frozen=True)
class Case:
    """What the published implementation was given and returned."""

    model: str
    name: str
    settings: dict
    arrays: dict

    def tensor(self, name):
        return torch.from_numpy(self.arrays[name])

    @property
    def memory_settings(self):
        """Settings as keywords, windows included."""
        windows = self.settings["generate_cache"]
        kept = {name: value for name, value in self.settings.items() if name in SETTINGS}
        return {**kept, "stride": windows["stride"], "max_length": min(windows["max_len"], 512)}

    @property
    def positions(self):
        """Each stored memory's position in `memory_ids`."""
        if "kept_positions" in self.arrays:
            return self.arrays["kept_positions"]
        return np.arange(self.arrays["memory_ids"].shape[1])


SETTINGS = (*IN_ATTENTION, "use_external_mind")


def case(model, name):
    path = REFERENCE / model / f"{name}.npz"
    described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    with np.load(path) as arrays:
        return Case(model, name, described["settings"], dict(arrays))


def published_folder(folder, model, settings=None):
    """Write a checkpoint as it was published; the remote code that it names is absent."""
    folder.mkdir()
    shutil.copy(REFERENCE / model / "model.safetensors", folder)
    config = json.loads((REFERENCE / model / "config.json").read_text(encoding="utf-8"))
    kind = "Mpt" if model == "mpt" else "Llama"
    config["model_type"] = f"extended-{kind.lower()}"
    config["architectures"] = [f"Extended{kind}ForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": f"configuration.Extended{kind}Config",
        "AutoModelForCausalLM": f"modeling.Extended{kind}ForCausalLM",
    }
    for name, value in (settings or {}).items():
        inside = kind == "Mpt" and name in IN_ATTENTION
        (config["attn_config"] if inside else config)[name] = value
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
