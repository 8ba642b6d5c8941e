"""Make configs/tokenizers/reasoning_512.json: a byte-level BPE of exactly 512 ids for the demo. Deterministic.

    python -m experiments.demo.make_tokenizer [--out configs/tokenizers/reasoning_512.json]

Why not bytes: a question of count_bits is 75 bytes of template around four digits, and a small model on a CPU would
spend most of its time reading it. Ids 0 to 6 are the special tokens, then the 256 bytes (so any text can be encoded),
then 249 merges learnt from the demo's questions and worked solutions and, lightly, from other reasoning_gym tasks.
Digits and signs never merge with each other, only with one space before them: arithmetic is seen digit by digit.
Prints how many tokens the questions and solutions take.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from m1jax.data.chat import render
from m1jax.data.problems import parse_tasks
from m1jax.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from m1jax.data.worked_solutions import worked_solution

VOCABULARY = 512
DEMO = "count_bits(min_n=1, max_n=2047), chain_sum(min_terms=2, max_terms=4, min_digits=1, max_digits=1)"
WORKED = f"{DEMO}, gcd(name='gcd2'), base_conversion(name='base_conversion2', min_value=1)"
OTHERS = """ab, aiw, basic_arithmetic, binary_alternation, bitwise_arithmetic, caesar_cipher, calendar_arithmetic,
    complex_arithmetic, count_primes, course_schedule, decimal_arithmetic, dice, family_relationships,
    fraction_simplification, knights_knaves, lcm, leg_counting, letter_counting, maze, n_queens, number_filtering,
    number_format, number_sequence, number_sorting, polynomial_equations, power_function, prime_factorization,
    products, propositional_logic, rotate_matrix, self_reference, shortest_path, simple_equations, simple_geometry,
    spell_backward, spiral_matrix, string_manipulation, sudoku, time_intervals, word_sorting"""

# A word, one digit or one sign, each with at most one space before it; else a run of white space.
PIECES = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+")


def texts() -> Iterator[str]:
    """Yield the training texts; the demo's two tasks weigh most, so that their every word becomes one token."""
    rng = Random(0)
    for task, count in zip(parse_tasks(WORKED), (3000, 3000, 1000, 1000), strict=True):
        for problem in (task[index] for index in range(count)):
            yield problem.question
            yield worked_solution(problem, rng, reflection=0.2)
    for task in parse_tasks(OTHERS):
        yield from (task[index].question[:400] for index in range(3))


def make() -> Tokenizer:
    """Return the trained tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(PIECES, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The special tokens are not text to learn merges from; what stands around them is.
    tokenizer.train_from_iterator(
        (text.replace("<think>", "").replace("</think><answer>", "\n").replace("</answer>", "") for text in texts()),
        trainer,
    )
    return tokenizer


def report(path: Path) -> None:
    """Print the lengths of prompts and solutions in tokens, by task."""
    tokenizer, rng = load_tokenizer(str(path)), Random(1)
    print(f"{path}: {tokenizer.vocab_size} ids")
    print(f"{'task':18} {'prompt mean':>11} {'max':>4} {'solution mean':>14} {'max':>4}")
    for task in parse_tasks(WORKED):
        problems = [task[index] for index in range(2000)]
        prompts = [len(render(problem.question, tokenizer=tokenizer)) for problem in problems]
        solutions = [len(tokenizer.encode(worked_solution(problem, rng, 0.1))) + 1 for problem in problems]  # + <eos>
        mean_prompt, mean_solution = sum(prompts) / len(prompts), sum(solutions) / len(solutions)
        print(f"{task.name:18} {mean_prompt:11.1f} {max(prompts):4} {mean_solution:14.1f} {max(solutions):4}")
    sample = worked_solution(problems[0], rng, 0.5)
    print(" | ".join(tokenizer.decode([index]) for index in tokenizer.encode(problems[0].question + sample)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("configs/tokenizers/reasoning_512.json"))
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    make().save(str(out), pretty=True)
    report(out)
