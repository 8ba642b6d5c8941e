"""MiniMax-M1 for SGLang servers, which do not know it: nothing here imports jax or the rest of m1jax.

A server runs in an environment of its own (torch, sglang, transformers; no jax) and finds this package by the entry
point `sglang.srt.plugins` of pyproject.toml, in every process that it starts:

    plugin.py       what SGLang is told: the config class, the kind of hybrid, the classes, the check of an update
    config.py       config.json as `convert_weights` and the weight sync write it
    checkpoint.py   the tensors of a folder: names, shapes, and what is wrong with one
    recurrence.py   lightning attention over tensors: slopes, a prompt in chunks, one step of many requests
    backend.py      the recurrence over a server's pool of states
    repetition.py   the repetition stop as a logit processor, for clients that ask for it
    models/         the network, out of SGLang's parallel layers
    cpu/            a server without a GPU: what to install, and stand-ins for what needs one

What was run: sglang 0.5.23 on a CPU in float32, one rank (`make sglang-test`). The GPU paths, the tensor-parallel ones
and every dtype but float32 were written from SGLang's sources and have not run.
"""
