"""Where does a model lose a number that is hidden in a long text? Accuracy over depth and length, as a picture.

    python examples/research/depth.py --model FOLDER --out examples/research/images/depth
    python examples/research/depth.py --model FOLDER --out FILE --kind single --adapter FOLDER
    python examples/research/depth.py --model FOLDER --out FILE --method routers --load FILE

The text is the documentation of Python's standard library. Writes `OUT.json` and `OUT.png` after every length.
`--load` is what `compare.py --method routers --save FILE` wrote. Frozen linear layers multiply in bfloat16, everything
else is float32; `--float32` for all of it. On a text of one's own: `peft-moice measure`.
"""

import argparse
import dataclasses
from pathlib import Path

import trained
from forms import docstrings
from models import halve

from peft_moice.evaluation import POSITIONS, Needles, evaluate


def main(args: argparse.Namespace) -> None:
    model, tokenizer = trained.load(args)
    if not args.float32:
        halve(model)
    task = Needles(docstrings(), tokenizer, args.kind)
    options = {"positions": args.positions, "num_groups": args.questions, "seed": args.seed, "name": args.name}
    so_far = None
    for length in args.lengths:
        result = evaluate(model, tokenizer, task, lengths=[length], **options)
        so_far = dataclasses.replace(result, scores=(so_far.scores if so_far else ()) + result.scores)
        so_far.save(args.out.with_suffix(".json"))
        so_far.plot().savefig(args.out.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    trained.add_arguments(parser)
    parser.add_argument("--kind", default="keys", choices=("single", "keys", "values", "variables"))
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--positions", nargs="+", type=float, default=list(POSITIONS))
    parser.add_argument("--questions", type=int, default=8, help="questions at each position and length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="SmolLM2-135M-Instruct", help="of the model, for the picture")
    parser.add_argument("--out", required=True, type=Path, help="files without their endings")
    main(parser.parse_args())
