"""Adapters on the Hugging Face Hub, with a model card that says what they are and how they are loaded.

PEFT's own `model.push_to_hub` puts a blank card over the one that it has saved, and trainers put theirs over it;
[`push_to_hub`] is the call to use in their place.
"""

import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel, TaskType
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import unwrap_model

from ..files.atomic import write_text
from ..files.weights import read_json
from ..routing.spec import PEFT_TYPE_NAME
from .card import CARD_NAME, adapter_part, table, values_table

logger = logging.getLogger(__name__)

Table = str | Sequence[Mapping[str, Any]]


def push_to_hub(
    model: PeftModel,
    repo_id: str,
    *,
    adapter_name: str | None = None,
    base_model: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    evaluation: Table | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload MoICE adapter",
) -> str:
    """Upload one adapter and its model card to the Hub, in one commit. A card that is there already is replaced.

    Args:
        model: a model with MoICE adapters.
        repo_id: repository to push to, such as "user/name". Created if it does not exist.
        adapter_name: which adapter. Default: the active one.
        base_model: Hub id of the base model, needed where the base model was loaded from a local folder. Default: the
            name in the adapter's config.
        recipe: how it was trained, as names and values; a table in the card.
        evaluation: what was measured, as rows with equal keys or as Markdown; a table in the card.
        private: whether a new repository is private. Default: the organization's setting.
        token: access token, see `huggingface_hub.HfApi`.
        revision: branch to push to, created if it does not exist. Default: main.
        create_pr: open a pull request instead of committing to the branch. Default: False.
        commit_message: message of the commit.

    Returns:
        The URL of the commit.

    Raises:
        TypeError: the model is not a PEFT model.
        ValueError: it has no such MoICE adapter, or several are active and `adapter_name` is missing.
    """
    adapter_name = _adapter_of(model, adapter_name)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    said = {"repo_id": repo_id, "base_model": base_model, "recipe": recipe, "evaluation": evaluation}
    with tempfile.TemporaryDirectory() as folder:
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=_save_for_others(model, Path(folder), adapter_name, said),
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return commit.commit_url


def _save_for_others(model: PeftModel, folder: Path, adapter_name: str, said: dict[str, Any]) -> Path:
    """Write one adapter and its card, see [`write_model_card`] for what is `said` in it; returns where they are."""
    model.save_pretrained(str(folder), selected_adapters=[adapter_name])
    # PEFT puts every adapter but "default" into a folder of its own; in a repository it stands at the top.
    adapter_folder = folder if adapter_name == "default" else folder / adapter_name
    base_model = _base_model_of(model, adapter_name, said["base_model"])
    if base_model is not None:
        file = adapter_folder / CONFIG_NAME
        write_text(file, json.dumps({**read_json(file), "base_model_name_or_path": base_model}, indent=2))
    write_model_card(model, adapter_folder, adapter_name=adapter_name, **{**said, "base_model": base_model})
    return adapter_folder


def write_model_card(
    model: PeftModel,
    folder: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    repo_id: str | None = None,
    base_model: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    evaluation: Table | None = None,
) -> Path:
    """Write the model card of an adapter to `folder`/README.md, in place of whatever card is there.

    `save_pretrained` writes one too, without the recipe, the evaluation and a name to load it by. Saving again to the
    same folder keeps these sections.

    Args:
        model: a model with MoICE adapters.
        folder: where the adapter was saved.
        adapter_name: which adapter. Default: the active one.
        repo_id: what the snippet in the card loads. Default: `folder`.
        base_model: see [`push_to_hub`].
        recipe: see [`push_to_hub`].
        evaluation: see [`push_to_hub`].

    Returns:
        The path of the card.

    Raises:
        TypeError: the model is not a PEFT model.
        ValueError: see [`push_to_hub`]; or the rows of `evaluation` have different keys.
    """
    adapter_name = _adapter_of(model, adapter_name)
    config: Any = model.peft_config[adapter_name]
    base_model = _base_model_of(model, adapter_name, base_model)
    weights = [parameter for name, parameter in model.named_parameters() if f".moice_router.{adapter_name}." in name]
    part = adapter_part(
        config.router_specs(),
        ropes=config.ropes_by_position(),
        base_model=base_model,
        is_causal_lm=config.task_type == TaskType.CAUSAL_LM,
        source=str(repo_id or folder),
        parameters=sum(weight.numel() for weight in weights),
    )
    further = []
    if recipe:
        further.append(f"## Training\n\n{values_table(recipe)}")
    if evaluation:
        further.append(f"## Evaluation\n\n{evaluation if isinstance(evaluation, str) else table(evaluation)}")
    path = Path(folder, CARD_NAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, part.as_card(further))
    return path


def add_to_card(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Say in the model card that is in `folder` what the routers of `model` are and how it is loaded.

    The model may be wrapped. Does nothing for models without routers, and for those with several active adapters.
    """
    model = unwrap_model(model)
    if isinstance(model, PeftModel):
        active: list[Any] = [model.peft_config[name] for name in model.active_adapters]
        if len(active) == 1 and _is_moice(active[0]):
            active[0].put_in_card(folder)
    elif isinstance(model, PreTrainedModel) and hasattr(model.config, "put_in_card"):
        model.config.put_in_card(folder)


def _adapter_of(model: PeftModel, adapter_name: str | None) -> str:
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"The model has to be a PeftModel with a MoICE adapter, not {type(model).__name__}. (A merged model is an "
            "ordinary transformers model, with a `push_to_hub` of its own.)"
        )
    if adapter_name is None:
        active = model.active_adapters
        if len(active) != 1:
            raise ValueError(f"The adapters {active} are active; say which one is meant with `adapter_name`.")
        adapter_name = active[0]
    if not _is_moice(model.peft_config.get(adapter_name)):
        known = [name for name, config in model.peft_config.items() if _is_moice(config)]
        raise ValueError(f"The model has no MoICE adapter called {adapter_name!r}; it has {known}.")
    return adapter_name


def _is_moice(config: PeftConfig | None) -> bool:
    return config is not None and config.peft_type == PEFT_TYPE_NAME


def _base_model_of(model: PeftModel, adapter_name: str, base_model: str | None) -> str | None:
    """The Hub id of the base model, or None if all that is known is a local folder."""
    name = base_model or model.peft_config[adapter_name].base_model_name_or_path
    if name and os.path.isdir(name):
        logger.warning(
            "The base model was loaded from the local folder %s, which nobody else has, so the model card does not "
            "name it. Give its Hub id as `base_model`.",
            name,
        )
        return None
    return name or None
