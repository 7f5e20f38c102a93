"""Write the configurations that ship: two that name every setting, and the published method.

    python scripts/write_configs.py

Run it when a setting of `MemoryConfig` has changed.
"""

from pathlib import Path

from emt.config import PUBLISHED_METHOD, SETTINGS, MemoryConfig, yaml_form

CONFIGS = Path(__file__).parent.parent / "configs"
TITLES = {
    "manual": "A memory as tensors, searched exactly. Every other setting is named, with its "
    "default.",
    "vector_db": "A memory on disk, searched by FAISS. Every other setting is named, with its "
    "default.",
    "published": "The published method, Extended Mind Transformers (arXiv 2406.02332): the "
    "settings\n# whose defaults differ from it.",
}
HEADER = """\
# {title}
# Written by scripts/write_configs.py.
# emt index docs/ --store memories/ --config configs/{name}.yaml

"""


def text_of(name: str) -> str:
    """Return the text of a config."""
    if name == "published":
        settings = {key: each for key, each in SETTINGS.items() if key in PUBLISHED_METHOD}
        body = yaml_form.dump(PUBLISHED_METHOD, settings)
    else:
        body = yaml_form.dump(MemoryConfig(memory_type=name).to_dict(), SETTINGS)
    return HEADER.format(title=TITLES[name], name=name) + body


def main() -> None:
    """Write the files."""
    for name in TITLES:
        (CONFIGS / f"{name}.yaml").write_text(text_of(name), encoding="utf-8")


if __name__ == "__main__":
    main()
