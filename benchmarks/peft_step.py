"""PEFT's side of `step_time.py`: for each line of input, make a step and print its times.

The same shapes on torch: a `BertModel` with random weights and a classifier, LoRA on every
linear layer of the encoder and the pooler, AdamW, one fixed batch.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification


def main() -> None:
    args = json.loads(sys.argv[1])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=args["vocabulary"],
        hidden_size=args["width"],
        num_hidden_layers=args["layers"],
        num_attention_heads=max(1, args["width"] // 64),
        intermediate_size=4 * args["width"],
        hidden_act="gelu_pytorch_tanh",
        hidden_dropout_prob=args["dropout"],
        attention_probs_dropout_prob=args["dropout"],
        max_position_embeddings=max(512, args["length"]),
        num_labels=args["classes"],
    )
    lora = LoraConfig(
        r=args["rank"],
        lora_alpha=args["alpha"],
        target_modules=r".*(query|key|value|dense)",
        modules_to_save=["classifier"],
    )
    model = get_peft_model(BertForSequenceClassification(config), lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    total = sum(p.numel() for p in model.parameters())
    print(f"PEFT: {sum(p.numel() for p in trained):,} of {total:,} train", flush=True)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    shape = (args["batch"], args["length"])
    batch = {
        "input_ids": torch.randint(0, args["vocabulary"], shape),
        "token_type_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "labels": torch.randint(0, args["classes"], (args["batch"],)),
    }
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)


if __name__ == "__main__":
    main()
