"""Write configs/manual.yaml and configs/vector_db.yaml, which name and explain every setting.

    python scripts/write_configs.py

Run it when a setting of `MemoryConfig` has changed.
"""

from pathlib import Path

from emt.config import SETTINGS, MemoryConfig, yaml_form

CONFIGS = Path(__file__).parent.parent / "configs"
TITLES = {
    "manual": "A memory as tensors, searched exactly.",
    "vector_db": "A memory on disk, searched by FAISS.",
}
HEADER = """\
# {title} Every other setting is named, with its default.
# Written by scripts/write_configs.py.
# emt index docs/ --store memories/ --config configs/{name}.yaml

"""


def text_of(name: str) -> str:
    """Return the text of a config that names every setting."""
    config = MemoryConfig(memory_type=name)
    return HEADER.format(title=TITLES[name], name=name) + yaml_form.dump(config.to_dict(), SETTINGS)


def main() -> None:
    """Write the files."""
    for name in TITLES:
        (CONFIGS / f"{name}.yaml").write_text(text_of(name), encoding="utf-8")


if __name__ == "__main__":
    main()
