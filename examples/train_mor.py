"""Train a Mixture-of-Recursions model with `transformers.Trainer`, on text that is already here.

python examples/train_mor.py --max_steps 200

Everything here is an ordinary Transformers part; `mor train` does the same with more options.
"""

import sys

from transformers import HfArgumentParser, LlamaConfig, Trainer, TrainingArguments

from mor import MoRConfig, MoRForCausalLM
from mor.data import TokenBlocks, prepare_tokens, train_tokenizer
from mor.data.corpus import open_corpus


def main(arguments: list[str]) -> Trainer:
    """Ten lines; options are those of `transformers.TrainingArguments`."""
    args: TrainingArguments
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(arguments)
    corpus = open_corpus()  # the standard library's sources; or a file, a folder, a dataset's name
    tokenizer = train_tokenizer(corpus, vocab_size=4096)
    with args.main_process_first():
        files = prepare_tokens(corpus, tokenizer, args.output_dir)
    dense = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=3,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = MoRForCausalLM(MoRConfig(base_config=dense, num_recursions=3, router="expert"))
    blocks = TokenBlocks(files, block_length=256)
    trainer = Trainer(model, args, train_dataset=blocks, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()  # with the tokenizer: `mor generate` takes the folder
    return trainer


DEFAULTS = """--output_dir runs/example --max_steps 200 --per_device_train_batch_size 4
--learning_rate 3e-3 --lr_scheduler_type cosine --warmup_steps 10 --logging_steps 10
--save_strategy no --report_to none""".split()

if __name__ == "__main__":
    main([*DEFAULTS, *sys.argv[1:]])
