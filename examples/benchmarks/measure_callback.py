"""What `MoICECallback` costs: steps that it measures and logs against steps that it does not, in one run.

    python examples/benchmarks/measure_callback.py

The model has the shape of SmolLM2-135M and random weights; the steps alternate.
"""

import argparse
import statistics
import tempfile
import time

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments

from peft_moice import MoICEConfig
from peft_moice.training.callback import MoICECallback

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


class Clock(TrainerCallback):
    """Processor seconds from the begin of each step to that of the next, which other programs disturb little."""

    def __init__(self):
        self.begins = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.begins.append(time.process_time())

    def seconds(self) -> list[float]:
        return [later - begin for begin, later in zip(self.begins, self.begins[1:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512, help="tokens of a step (default: 512)")
    parser.add_argument("--steps", type=int, default=40, help="steps, half of them measured (default: 40)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    config = MoICEConfig(base_multipliers=[1.0, 0.25, 0.5, 2.0, 4.0], top_k=2, task_type="CAUSAL_LM")
    rows = [{"input_ids": torch.randint(49152, (options.length,))} for _ in range(8)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=options.steps + 3,
            per_device_train_batch_size=1,
            logging_steps=2,
            report_to="tensorboard",
            save_strategy="no",
        )
        trainer = Trainer(get_peft_model(model, config), arguments, train_dataset=rows)
        trainer.add_callback(clock)
        trainer.add_callback(MoICECallback(trainer))
        trainer.train()
    # The first two steps warm up. Even steps are logged.
    seconds = clock.seconds()[2:]
    unlogged, logged = statistics.median(seconds[0::2]), statistics.median(seconds[1::2])
    differences = [with_log / without - 1 for without, with_log in zip(seconds[0::2], seconds[1::2], strict=False)]
    print(f"unlogged steps: median {unlogged:.3f} CPU s; logged steps: median {logged:.3f} CPU s")
    print(f"a logged step takes {100 * statistics.median(differences):+.1f} % (median of {len(differences)} pairs)")


if __name__ == "__main__":
    main()
