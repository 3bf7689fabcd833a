"""The plan of a run: what it will need, before it takes a GPU. Predicted from shapes; nothing runs.

    python -m kit.bench plan --model qwen2.5-vl-7b --frames 3600 --gpus 8 --gpu_memory 80
    python train.py ... --dry_run       the same for a run's own checkpoint, rows and ranks

A run of long videos rarely fails at its start: it fails at the first long video, in the backward
pass, an hour later. A plan answers before: how long is the packed sequence, what does each part of
a step keep on a GPU, does it fit, and which setting would make it fit.

    (D, M, V, heads) of config.json --+
    F frames x K tokens a frame       +--> memory() --> {part: bytes of a GPU}, and their peak
    ranks, sp, chunk, prefill       --+

    rollout     weights  optimizer  sampler   cache of keys and values, one layer of the prefill
    backward    weights  optimizer  sampler   activations of all layers, logits or one layer again
      its end   weights  optimizer  sampler   gradients of all weights, one layer again
                |__ always there __________|  |__ come and go: the peak is the largest row, not
                                                  the sum of all parts

Large systems try and adapt: DeepSpeed has estimators for parameters and optimizer alone, vLLM
profiles one forward pass at its start, trainers leave the batch size to the user. Counting is
possible here since a step has one shape: one packed sequence, checkpointed layer by layer.

What the numbers leave out: the vision tower (it has gone through the video before), fragmentation
and CUDA's own memory: compare them with 92 % of a GPU. Tests count the bytes of every tensor alive
in a real step of small decoders: the prediction is within a fifth of the count.

Check this file alone:  pytest tests/test_plan.py
"""

from math import gcd

# -------------------------------------------------------------------------- memory of a step

SHAPES = {  # of published decoders, named as in their config.json
    "qwen2.5-vl-7b": dict(
        num_hidden_layers=28,
        hidden_size=3584,
        intermediate_size=18944,
        vocab_size=152064,
        num_attention_heads=28,
        num_key_value_heads=4,
        head_dim=128,
        tie_word_embeddings=False,
    ),
}
SHAPES["longvila-7b"] = SHAPES["qwen2.5-vl-7b"] | {"vocab_size": 151672}  # the same decoder
PER_FRAME = {  # tokens
    "qwen2.5-vl-7b": 71,  # the paper's 3,600 frames in ~256k tokens; depends on the resolution
    "longvila-7b": 257,  # 448 px, 2x2 blocks, newline; 122 with 3x3 blocks; 196 at 384 px
}


def widths(shape: dict) -> tuple[int, ...]:
    """D of the model, M of the MLP, V of the vocabulary, Q of all query heads, K of all keys'."""
    q = shape["num_attention_heads"] * shape["head_dim"]
    k = shape["num_key_value_heads"] * shape["head_dim"]
    return shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"], q, k


def parameters(shape: dict) -> tuple[int, int]:
    """Parameters of one layer, and of embedding, final norm and LM head.

    >>> layer, root = parameters(SHAPES["qwen2.5-vl-7b"])
    >>> round((28 * layer + root) / 1e9, 2)  # as published
    7.62
    """
    d, m, v, q, k = widths(shape)
    attention = 2 * d * (q + k) + q + 2 * k  # with the biases of queries, keys and values
    matrices = 1 if shape["tie_word_embeddings"] else 2
    return attention + 3 * d * m + 2 * d, matrices * v * d + d


def memory(
    shape: dict, prompt: int, answers: int, gpus=1, sp=1, c=2, chunk=8192, prefill=None, rl=True
) -> dict[str, float]:
    """Bytes of a GPU, by part, at the peak of a step that trains prompt + answers tokens (answers
    of one prompt) with FSDP2 over all GPUs and sp ranks a sequence.

    shape: of the decoder, named as in config.json; c: bytes of a number in a layer; chunk: answer
    tokens in the LM head at once; prefill: prompt tokens that the sampler takes at once (None: all,
    as the torch sampler does); rl: with sampler and reference. `total` is the peak: see above.
    """
    d, m, v, q, k = widths(shape)
    n_layers = shape["num_hidden_layers"]
    layer, root = parameters(shape)
    n = n_layers * layer + root
    length = prompt + answers
    t = length / sp
    sharded = gpus > 1
    ulysses = gcd(shape["num_attention_heads"], shape["num_key_value_heads"], sp)
    part = {
        "weights": 4 * n / gpus,  # float32 masters
        "optimizer": 8 * n / gpus,  # AdamW's two averages
        "engine": c * n * (1 + 1 / gpus) if rl else 0,  # sampler, whole; shards of the reference
        # Two layers, and embedding and head throughout: gathered, or cast for a layer.
        "gathered": c * (2 * layer + root) if sharded or c < 4 else 0,
        # Sharded: and those of one layer before they are added up.
        "gradients": 4 * n / gpus + ((4 + c) * layer if sharded else 0),
        # What checkpointing keeps of each layer; final norm and its input; the pack's layout.
        "activations": c * t * d * (n_layers + 2) + 64 * t,
        # One layer again, during its backward.
        "layer": t * (16 * d + c * (3 * d + 3 * q + 2 * k + 6 * m)),
        "kv": 0.0,  # travelling keys and values, below
        "embeddings": c * t * d,  # in host memory: 4 D a token of the whole video
        "logits": 16 * v * min(chunk, answers / sp),  # float32: logits, log-softmax, exp, product
        "rollout": 0.0,  # below
    }
    if ulysses > 1:
        part["kv"] += 2 * c * t * (q + 2 * k)
    if ulysses < sp:  # gathered whole, and their gradients
        part["kv"] += (c + 4) * 2 * k * length
    if rl:  # the sampler's cache, and one layer of the prefill
        at_once = min(prefill or prompt, prompt)
        part["rollout"] = c * (n_layers * 2 * k * length + at_once * (4 * d + 3 * m))
    held = part["weights"] + part["optimizer"] + part["engine"]
    # The MLP's part is freed before attention's backward, when keys and values travel.
    running = part["layer"] + max(0, part["kv"] - 6 * c * t * m)
    begin = part["activations"] + max(running + 4 * root, part["logits"])  # of backward
    end = 2 * c * t * d + part["gradients"] + running  # at the first layer
    training = part["gathered"] + part["embeddings"] + max(begin, end)
    return part | {"total": held + max(training, part["rollout"])}
