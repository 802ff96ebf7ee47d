"""Train a small decoder from nothing, with and without MoICE routers, and compare them by position.

Two Llama models of about a million parameters are trained on the bytes of Python's own standard library: one as it
is, one with routers in every layer, all weights trainable. Both start from the same weights and read the same batches
in the same order. Files that neither was trained on are then read in windows twice as long as in training, and the
loss is reported by position in the window.

    python examples/train_from_scratch.py --output_dir outputs/from_scratch

Some minutes a seed on one core. The model with routers is written to `<output_dir>/with_routers` in the format of
merged models, which `AutoModelForCausalLM.from_pretrained` reads after `import peft_moice`.
"""

import json
import math
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup, set_seed

from peft_moice import MoICEConfig
from peft_moice.tuner.pretraining import add_routers


@dataclass
class Arguments:
    """Model, routers and training."""

    output_dir: str = field(default="outputs/from_scratch", metadata={"help": "Folder for results and model."})
    hidden_size: int = field(default=128, metadata={"help": "Size of hidden states."})
    layers: int = field(default=4, metadata={"help": "Number of layers."})
    heads: int = field(default=4, metadata={"help": "Number of attention heads."})
    rope_theta: float = field(default=10_000.0, metadata={"help": "Base angle of both models."})
    angles: list[float] = field(
        default_factory=lambda: [1.0, 0.25, 0.5, 2.0, 4.0],
        metadata={"help": "Base angles of the model with routers, as multiples of rope_theta."},
    )
    top_k: int = field(default=2, metadata={"help": "Angles mixed per head and token."})
    aux_coef: float = field(default=0.01, metadata={"help": "Weight of the balance loss."})
    length: int = field(default=512, metadata={"help": "Bytes in a training window."})
    batch_size: int = field(default=4, metadata={"help": "Windows in a step."})
    steps: int = field(default=200, metadata={"help": "Training steps."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of matrices."})
    eval_windows: int = field(default=32, metadata={"help": "Windows of twice the length that are measured."})
    buckets: int = field(default=8, metadata={"help": "Parts of a window that losses are reported for."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Both models are trained per seed."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})


def main(args: Arguments) -> None:
    torch.set_num_threads(args.threads)
    if 2 * args.length % args.buckets:
        raise ValueError(f"--buckets is {args.buckets}, but has to divide {2 * args.length}, twice --length.")
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    train_bytes, eval_bytes = read_sources()
    windows = eval_windows(eval_bytes, 2 * args.length, args.eval_windows)
    results = {"arguments": asdict(args), "train_bytes": len(train_bytes), "runs": []}
    losses = {"without": [], "with": []}
    for seed in args.seeds:
        for name in losses:
            model = make_model(args, seed, with_routers=name == "with")
            start = time.perf_counter()
            train(model, train_bytes, args, seed, description=f"{name} routers, seed {seed}")
            seconds = time.perf_counter() - start
            by_token = measure(model, windows)
            losses[name].append(by_token)
            results["runs"].append(
                {
                    "routers": name,
                    "seed": seed,
                    "parameters": model.num_parameters(),
                    "train_seconds": seconds,
                    "loss_within_length": by_token[:, : args.length - 1].mean().item(),
                    "loss_by_position": by_bucket(by_token, args.buckets).mean(dim=0).tolist(),
                }
            )
        results["difference"] = compare(losses, args)
        (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    model.save_pretrained(output_dir / "with_routers")  # the last one trained
    print_tables(results, output_dir)


def read_sources() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the standard library's modules for training, and of every tenth module, held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = [b"\n".join(file.read_bytes() for i, file in enumerate(files) if (i % 10 == 0) == held) for held in (0, 1)]
    train_bytes, eval_bytes = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return train_bytes, eval_bytes


def eval_windows(data: torch.Tensor, length: int, number: int) -> torch.Tensor:
    """`[number, length]` windows at equal distances in `data`."""
    if len(data) < number * length:
        raise ValueError(f"There are {len(data):,} bytes to measure on, too few for {number} windows of {length}.")
    starts = torch.linspace(0, len(data) - length, number).long()
    return torch.stack([data[start : start + length] for start in starts]).long()


def make_model(args: Arguments, seed: int, with_routers: bool) -> LlamaForCausalLM:
    """A fresh model; all weights but the routers' are the same with and without them."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=2 * args.length,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    if with_routers:
        routers = MoICEConfig(base_multipliers=args.angles, top_k=args.top_k, router_aux_loss_coef=args.aux_coef)
        model = add_routers(model, routers)
    return model


def train(model: LlamaForCausalLM, data: torch.Tensor, args: Arguments, seed: int, description: str) -> None:
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, args.steps // 20), args.steps)
    order = torch.Generator().manual_seed(seed)
    model.train()
    progress = tqdm(range(args.steps), desc=description, unit="step")
    for _ in progress:
        starts = torch.randint(len(data) - args.length, (args.batch_size,), generator=order)
        batch = torch.stack([data[start : start + args.length] for start in starts]).long()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss  # with routers: plus the balance loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def measure(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Losses `[W, S - 1]` in nats of every predicted byte of `windows` `[W, S]`."""
    model.eval()
    losses = []
    for batch in tqdm(windows.split(4), desc="measuring", unit="batch"):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.mT, batch[:, 1:], reduction="none"))
    return torch.cat(losses)


def by_bucket(by_token: torch.Tensor, buckets: int) -> torch.Tensor:
    """Mean losses `[W, buckets]` of equal parts of the windows; the first lacks the byte that nothing predicts."""
    size = (by_token.shape[1] + 1) // buckets
    first, rest = by_token[:, : size - 1].mean(dim=1, keepdim=True), by_token[:, size - 1 :]
    return torch.cat((first, rest.unflatten(1, (buckets - 1, size)).mean(dim=2)), dim=1)


def compare(losses: dict[str, list[torch.Tensor]], args: Arguments) -> dict:
    """Loss with routers minus loss without, with standard errors over windows (the mean of the seeds in each)."""

    def mean_and_error(values: torch.Tensor) -> list[float]:
        return [values.mean().item(), values.std().item() / math.sqrt(len(values))]

    difference = (torch.stack(losses["with"]) - torch.stack(losses["without"])).mean(dim=0)  # [W, S - 1]
    return {
        "within_length": mean_and_error(difference[:, : args.length - 1].mean(dim=1)),
        "by_position": [mean_and_error(column) for column in by_bucket(difference, args.buckets).T],
    }


def print_tables(results: dict, output_dir: Path) -> None:
    args, runs, difference = results["arguments"], results["runs"], results["difference"]
    print("\n| routers | seed | parameters | seconds | loss up to the training length |\n|---|---|---|---|---|")
    for run in runs:
        print(
            f"| {run['routers']} | {run['seed']} | {run['parameters']:,} | {run['train_seconds']:.0f} "
            f"| {run['loss_within_length']:.4f} |"
        )
    mean, error = difference["within_length"]
    print(f"\nWith minus without, up to the training length: {mean:+.4f} ± {error:.4f} nats per byte.\n")
    print("| positions | without | with | difference |\n|---|---|---|---|")
    size = 2 * args["length"] // args["buckets"]
    columns = {
        name: torch.tensor([run["loss_by_position"] for run in runs if run["routers"] == name]).mean(dim=0)
        for name in ("without", "with")
    }
    for part, (mean, error) in enumerate(difference["by_position"]):
        print(
            f"| {part * size} to {(part + 1) * size - 1} | {columns['without'][part]:.4f} "
            f"| {columns['with'][part]:.4f} | {mean:+.4f} ± {error:.4f} |"
        )
    print(f"\nresults.json and the last model with routers are in {output_dir}.", file=sys.stderr)


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    main(arguments)
