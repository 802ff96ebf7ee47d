"""What a training step minimises on its prompt: the loss of given answers, or distances from the base model itself.

`OBJECTIVES[name](model, tokenizer, draw)` returns a differentiable loss for one step; `draw` is a [`Draw`].
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from forms import draw as draw_form
from models import without_adapter
from torch import nn

from peft_moice.evaluation import FactList, encode_chat, sample_facts

TRAINED_FACTS = 30
PERTURBED_TOKENS = 400
LONGEST_JUMP = 2000


@dataclass
class Draw:
    """Where prompts come from.

    Attributes:
        rng: source of randomness.
        text: ordinary text, of which prompts are made.
        text_ids: its tokens.
        questions: questions a prompt.
        facts: lists of access codes in place of the five forms.
        joined: prompts of these forms one after the other in a chat. Default: 1.
    """

    rng: random.Random
    text: str
    text_ids: torch.Tensor
    questions: int
    facts: bool
    joined: int = 1


def answers(model: nn.Module, tokenizer, draw: Draw) -> torch.Tensor:
    """Cross-entropy of the answers."""
    if draw.facts:
        facts = sample_facts(TRAINED_FACTS, draw.rng, split="train")
        chat = encode_chat(tokenizer, facts, draw.rng.sample(range(len(facts)), draw.questions))
        ids = torch.tensor(chat.input_ids)
        labels = ids.masked_fill(~torch.tensor(chat.is_answer), -100)
    else:
        ids, labels = encode(tokenizer, draw_form(draw.rng, draw.text, draw.questions, draw.joined))
    first = labels.ne(-100).nonzero()[0].item()
    logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=len(ids) - first + 1).logits[0, :-1]
    return nn.functional.cross_entropy(logits.float(), labels[first:])


def best_position(model: nn.Module, tokenizer, draw: Draw) -> torch.Tensor:
    """KL from the base model that has the asked fact first, where it answers best, to the model that has it anywhere.

    After Pos2Distill (arXiv 2508.15709), without labels: it gives the answer itself.
    """
    facts = sample_facts(TRAINED_FACTS, draw.rng, split="train")
    asked = draw.rng.randrange(len(facts))
    order = [asked, *(i for i in range(len(facts)) if i != asked)]
    moved = FactList(tuple(facts.names[i] for i in order), tuple(facts.codes[i] for i in order))
    shown_first, shown_anywhere = encode_chat(tokenizer, moved, [0]), encode_chat(tokenizer, facts, [asked])
    start = shown_first.is_answer.index(True)
    length = sum(shown_first.is_answer)
    with torch.no_grad(), without_adapter(model):
        prompt = torch.tensor([shown_first.input_ids[:start]])
        answer = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length, min_new_tokens=length,
            do_sample=False, pad_token_id=0,
        )[0, start:]  # fmt: skip
        whole = torch.cat((prompt[0], answer))
        teacher = model(input_ids=whole[None], use_cache=False, logits_to_keep=length + 1).logits[0, :-1]
    ids = torch.tensor(shown_anywhere.input_ids[: shown_anywhere.is_answer.index(True)])
    student = model(
        input_ids=torch.cat((ids, answer))[None], use_cache=False, logits_to_keep=length + 1
    ).logits[0, :-1]  # fmt: skip
    return divergence(student, teacher)


def perturbed_positions(model: nn.Module, tokenizer, draw: Draw) -> torch.Tensor:
    """Reverse KL, on ordinary text, from the model whose positions jump once to the base model's plain ones.

    After arXiv 2604.14339. Predictions after the jump count.
    """
    start = draw.rng.randrange(len(draw.text_ids) - PERTURBED_TOKENS)
    ids = draw.text_ids[None, start : start + PERTURBED_TOKENS]
    place = draw.rng.randrange(PERTURBED_TOKENS // 4, 3 * PERTURBED_TOKENS // 4)
    positions = torch.arange(PERTURBED_TOKENS)
    positions[place:] += draw.rng.randrange(LONGEST_JUMP)
    kept = PERTURBED_TOKENS - place
    with torch.no_grad(), without_adapter(model):
        plain = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0]
    jumping = model(input_ids=ids, position_ids=positions[None], use_cache=False, logits_to_keep=kept).logits[0]
    return divergence(plain, jumping)


def divergence(of: torch.Tensor, from_: torch.Tensor) -> torch.Tensor:
    """KL(from_ ‖ of) of logits `[S, V]`, the mean over S."""
    return nn.functional.kl_div(
        of.float().log_softmax(-1), from_.float().log_softmax(-1), log_target=True, reduction="batchmean"
    )


def encode(tokenizer, messages: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and labels where the assistant speaks, the end of its turn included."""

    def render(count: int, add_generation_prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=add_generation_prompt
        )

    spans = [(len(render(i, True)), len(render(i + 1)) - 1) for i in range(1, len(messages), 2)]
    encoded = tokenizer(render(len(messages)), add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(a < end and start < b for start, end in spans) else -100
        for token, (a, b) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return torch.tensor(encoded["input_ids"]), torch.tensor(labels)


OBJECTIVES: dict[str, Callable[[nn.Module, object, Draw], torch.Tensor]] = {
    "answers": answers,
    "best_position": best_position,
    "perturbed_positions": perturbed_positions,
}
