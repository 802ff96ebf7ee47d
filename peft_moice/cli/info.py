"""`peft-moice info`: what an adapter or a merged model is, without loading its base model."""

import argparse
from typing import Any

from ..tuner.saved import describe_saved
from .parsing import Outcome, Parser

SUMMARY = "angles, K, layers, sizes, versions and card of an adapter or a merged model"


def parser() -> Parser:
    """Of the command's arguments."""
    parser = Parser(
        "info",
        (),
        usage="ADAPTER [--json]",
        summary=SUMMARY,
        further=", read from its files; the base model is not loaded.",
        epilog="example:\n  peft-moice info outputs/routers",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="Folder or Hub id of an adapter, or of a merged model.")
    return parser


def run(args: argparse.Namespace) -> Outcome:
    """Read the files."""
    found = describe_saved(args.adapter)
    found["layers"] = sorted(found["layers"], key=_by_number)
    # Files of weights and configs do not say it.
    found["versions"]["peft_moice"] = (found["card"] or {}).get("peft_moice_version")
    return Outcome(_as_text(found), found)


def _by_number(layer: str) -> list[tuple[int, str]]:
    """Sorts "layers.2" before "layers.10"."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in layer.split(".")]


def _as_text(found: dict[str, Any]) -> str:
    rows = {"": f"MoICE {found['kind']} {found['source']}", "base model": found["base_model"] or "not recorded"}
    rows |= found["in_words"]
    layers = found["layers"]
    if layers:
        rows["layers"] = f"{len(layers)}: {layers[0]}" + (f" to {layers[-1]}" if len(layers) > 1 else "")
    if found["parameters"] is not None:
        kinds = f" in {', '.join(found['dtypes'])}" if found["dtypes"] else ""
        rows["size"] = f"{found['parameters']:,} router parameters{kinds}; files of weights {found['bytes']:,} bytes"
    if found["also_saved"]:
        rows["also saved"] = ", ".join(found["also_saved"])
    rows["saved with"] = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    card = found["card"]
    rows["card"] = "none" if card is None else "; ".join(f"{name}: {value}" for name, value in card.items())
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" if name else value for name, value in rows.items())
