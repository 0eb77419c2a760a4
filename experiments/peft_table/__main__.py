"""Make the whole table: train and score, measure the costs, plan the memory of large models, write the tables and the plot.

    PYTHONPATH=. python -m experiments.peft_table --encoder=DIR --decoder=DIR --data=DIR --workdir=DIR

The command resumes where it was interrupted and keeps existing results: the files in results/, costs.json and plans.json. To
measure something again, remove its file.
"""

import argparse
import sys

from experiments.peft_table import costs, plans, study, table


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Make the whole table.")
    parser.add_argument("--encoder", required=True, help="Hugging Face directory of the encoder, MiniLM-L6")
    parser.add_argument("--decoder", required=True, help="Hugging Face directory of the decoder, SmolLM2-135M-Instruct")
    parser.add_argument("--data", required=True, help="Folder with FOLDER/{train,validation,test}.jsonl.gz")
    parser.add_argument(
        "--workdir", required=True, help="Folder for prepared data, unfinished runs and compiled programs"
    )
    options = parser.parse_args(argv)
    study.main(argv)
    if not table.COSTS.exists():
        costs.main(argv)
    if not table.PLANS.exists():
        plans.main()
    table.main([f"--workdir={options.workdir}"])


if __name__ == "__main__":
    main(sys.argv[1:])
