"""The model card of adapters and merged models: what it says, and how it comes into a folder that may have a card.

What a card quotes (names of models and layer types, values of a recipe) may come from strangers' files. It is escaped,
so that it is shown as it is and cannot become markup, metadata or code.
"""

import importlib.metadata
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]
from huggingface_hub import ModelCard, ModelCardData

from ..files.atomic import write_text
from ..rope.rules import RopeExpert, facts_of
from ..routing.describing import router_facts
from ..routing.spec import RouterSpec

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
TAGS = ("moice", "long-context")
PAPER = "https://arxiv.org/abs/2406.19598"
UNNAMED_FOLDER = "path/to/this/folder"
"""What a snippet loads where nobody has said how others will find the folder."""

_VERSION = "peft_moice_version"
_BEGIN, _END = (
    "<!-- peft_moice: what stands up to the next such mark is written anew by saving -->",
    "<!-- peft_moice -->",
)
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&$!])")


@dataclass(frozen=True)
class CardPart:
    """What this package has to say in a card.

    Attributes:
        data: the metadata.
        title: heading of a card that has no other.
        text: Markdown, without a heading of the first level.
    """

    data: ModelCardData
    title: str
    text: str

    def as_card(self, further: Sequence[str] = ()) -> str:
        """A whole card, with `further` sections after this part."""
        sections = [f"# {self.title}", self._marked(), *further]
        return _with_metadata(self.data, "\n\n".join(sections) + "\n")

    def merged_into(self, card: str) -> str:
        """`card` with this part in it: in the place of an earlier one, else before its first section.

        Tags are added to those that it has. Other metadata stays, except for a base model that is a local folder. Of
        a form with nothing filled in only the metadata is left.

        Raises:
            ValueError: the metadata of `card` cannot be read.
        """
        try:
            existing: Any = ModelCard(card, ignore_metadata_errors=True)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"The metadata of the model card cannot be read: {error}") from error
        own: Any = self.data
        data = {**own.to_dict(), **existing.data.to_dict(), _VERSION: _own_version()}
        if self.data.base_model or _is_local(data.get("base_model")):
            data["base_model"] = self.data.base_model
        theirs = existing.data.tags or []
        tags = [*([theirs] if isinstance(theirs, str) else map(str, theirs)), *own.tags]
        data["tags"] = [tag for tag in dict.fromkeys(tags) if not _is_local(tag.removeprefix(_ADAPTER_OF))]
        # PEFT adds this block to every card.
        content = re.sub(r"\n### Framework versions\n\n- PEFT [^\n]*\s*$", "\n", existing.text)
        before, mark, rest = content.partition(_BEGIN)
        if mark and _END in rest:
            text = before + self._marked() + rest.partition(_END)[2]
        elif _is_blank_form(content):
            text = f"# {self.title}\n\n{self._marked()}\n"
        else:
            section = re.search(r"^#{2,6} ", content, re.MULTILINE)
            place = section.start() if section else len(content)
            text = f"{content[:place].rstrip()}\n\n{self._marked()}\n\n{content[place:]}".strip() + "\n"
        return _with_metadata(ModelCardData(**data), text)

    def _marked(self) -> str:
        return f"{_BEGIN}\n\n{self.text}\n\n{_END}"


_ADAPTER_OF = "base_model:adapter:"
_WHAT_ROUTERS_DO = (
    f"[MoICE]({PAPER}) lets every attention head mix several rotary base angles, chosen per token by a small router, "
    "so that the model uses all of a long context."
)
_WHAT_ROPES_DO = (
    "Queries have ropes by their positions, and keys by their distances, so that the model reads longer texts and is "
    "unchanged where the first rule gives its own rope."
)


def put_card(folder: Path, part: CardPart) -> None:
    """Write `part` to the card of `folder`: a new one, or into the one that is there."""
    path = folder / CARD_NAME
    card = path.read_text(encoding="utf-8") if path.exists() else ""
    try:
        write_text(path, part.merged_into(card) if card.strip() else part.as_card())
    except ValueError as error:
        logger.warning("%s stays as it is. %s", path, error)


def adapter_part(
    specs: Sequence[RouterSpec],
    *,
    ropes: Sequence[RopeExpert] = (),
    base_model: str | None,
    is_causal_lm: bool,
    source: str = UNNAMED_FOLDER,
    parameters: int | None = None,
) -> CardPart:
    """What a card says about an adapter: its routers, its ropes by position, the Hub id of its base model if it has
    one, whether it was made for a causal language model, and the number of its parameters, if known. The snippet loads
    `source`, by default a placeholder.
    """
    load = "import peft_moice  # registers MoICE with PEFT; without it PEFT raises KeyError: 'MOICE'\n"
    if is_causal_lm and base_model:
        load += (
            "from peft import AutoPeftModelForCausalLM\n"
            "from transformers import AutoTokenizer\n\n"
            f"model = AutoPeftModelForCausalLM.from_pretrained({python_string(source)})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({python_string(base_model)})\n"
        )
    else:
        load += (
            "from peft import PeftModel\n\n"
            "base_model = ...  # the model that the adapter was trained on\n"
            f"model = PeftModel.from_pretrained(base_model, {python_string(source)})\n"
        )
    facts = router_facts(specs) | facts_of(ropes)
    if parameters:
        facts["Router parameters"] = f"{parameters:,}"
    tags = [*TAGS, *([_ADAPTER_OF + base_model] if base_model else [])]
    return CardPart(
        _metadata("peft", base_model, tags, is_causal_lm),
        f"{'MoICE routers' if specs else 'A longer window'}{_for(base_model)}",
        _sections(
            f"{_WHAT_ROUTERS_DO} This adapter holds the routers; the base model's weights are unchanged."
            if specs
            else f"{_WHAT_ROPES_DO} This adapter has no parameters.",
            load,
            f"## Adapter\n\n{_facts_table(facts)}",
        ),
    )


def merged_part(
    specs: Sequence[RouterSpec],
    *,
    ropes: Sequence[RopeExpert] = (),
    base_model: str | None,
    auto_class: str,
) -> CardPart:
    """What a card says about a whole model with routers built in: all kinds of them, its ropes by position, the Hub id
    of the model that they were built into if it has one, and the name of the auto class that loads it.
    """
    load = (
        "import peft_moice  # registers the model type\n"
        f"from transformers import {auto_class}, AutoTokenizer\n\n"
        f"model = {auto_class}.from_pretrained({python_string(UNNAMED_FOLDER)})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({python_string(UNNAMED_FOLDER)})\n"
    )
    return CardPart(
        _metadata("transformers", base_model, list(TAGS), auto_class == "AutoModelForCausalLM"),
        f"MoICE model{_for(base_model)}",
        _sections(
            f"{_WHAT_ROUTERS_DO} This is a whole model with the routers built in."
            if specs
            else f"{_WHAT_ROPES_DO} This is a whole model.",
            load,
            "Where that import cannot be made, `trust_remote_code=True` makes it: it runs `configuration_moice.py` of "
            "this repository, which imports the installed package and contains nothing else.",
            f"## {'Routers' if specs else 'Ropes'}\n\n{_facts_table(router_facts(specs) | facts_of(ropes))}",
        ),
    )


def shared_name(name: str | None) -> str | None:
    """`name` of a base model, unless it is a local folder's, which means nothing to others."""
    return None if not name or _is_local(name) else name


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of `rows`, whose keys name its columns.

    Raises:
        ValueError: the rows have different keys.
    """
    columns = list(rows[0])
    for row in rows:
        if list(row) != columns:
            raise ValueError(f"A table needs the same columns in every row, but one has {list(row)}, not {columns}.")
    return _table(list(map(plain, columns)), [[plain(row[column]) for column in columns] for row in rows])


def values_table(values: Mapping[str, Any]) -> str:
    """A Markdown table of names and values."""
    return table([{"": name, "value": value} for name, value in values.items()])


def plain(value: Any) -> str:
    """`value` as text on one line that Markdown shows as it is."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    line = "".join(character if character.isprintable() else " " for character in text)
    return _SPECIAL.sub(r"\\\1", " ".join(line.split()))


def python_string(text: str) -> str:
    """A literal of Python for `text` that cannot end the block of code that it stands in."""
    return repr(text).replace("`", r"\x60").replace("<", r"\x3c")


def _metadata(library: str, base_model: str | None, tags: list[str], is_causal_lm: bool) -> ModelCardData:
    pipeline_tag = "text-generation" if is_causal_lm else None
    data = ModelCardData(library_name=library, base_model=base_model or None, tags=tags, pipeline_tag=pipeline_tag)
    data[_VERSION] = _own_version()
    return data


def _own_version() -> str:
    # Not by an import: the package imports this module.
    version: str = sys.modules["peft_moice"].__version__
    return version


def _with_metadata(data: ModelCardData, text: str) -> str:
    return f"---\n{data.to_yaml()}\n---\n\n{text.lstrip()}"


def _for(base_model: str | None) -> str:
    return f" for {plain(base_model)}" if base_model else ""


def _sections(introduction: str, load: str, *further: str) -> str:
    versions = {"peft_moice": _own_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("peft", "transformers", "torch")}
    use = f"## Use\n\n```python\n{load}```"
    return "\n\n".join([introduction, use, *further, f"## Versions\n\n{_facts_table(versions)}"])


def _facts_table(facts: Mapping[str, str]) -> str:
    # The names are ours, the values may quote names of layer types.
    return _table(["", "value"], [[name, plain(value)] for name, value in facts.items()])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _is_local(name: object) -> bool:
    return isinstance(name, str) and (os.path.isabs(name) or os.path.isdir(name))


def _is_blank_form(text: str) -> bool:
    """Whether `text` is the form that PEFT writes, with nothing filled in."""
    return bool(text.split() == ModelCard.from_template(ModelCardData()).text.split())
