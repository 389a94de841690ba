"""T5 and Llama in plain PyTorch, and the Hugging Face folders they are loaded from and saved to, with the same names and numbers.

A batch is kept packed: linear layers see (tokens, d), the real tokens of all rows one after another; only attention lays them
out as (B, H, S, D). No work is spent on padding, and MIGU's magnitudes are plain sums over what a layer saw.
"""
import itertools, json, math, mmap, os, re, struct
from pathlib import Path
from types import SimpleNamespace
import torch
import torch.nn.functional as F
from torch import nn

torch.backends.cuda.enable_cudnn_sdp(False)                        # its backward pass with a mask can give NaN (torch issue 196678)
# ---- the parts of both models
def send(tensor, device):
    """To the device; what comes from the CPU goes through pinned memory, so that nobody waits for the GPU."""
    pin = tensor.device.type == "cpu" and torch.device(device).type == "cuda"
    return (tensor.pin_memory() if pin else tensor).to(device, non_blocking=True)

class Rows:
    """Where the real tokens of a batch lie, by its mask (B, S), bool; kept on the CPU, it lets no step wait for the GPU."""
    def __init__(self, mask, device, cache=None):
        self.size, self.mask = mask.shape, send(mask, device)
        self.positions = mask.flatten().nonzero().squeeze(1)       # (tokens,), on the mask's device
        self.index = send(self.positions, device)
        if cache is not None:                                      # rows that began before: (B, keys), the mask of all ids so far
            self.mask, = cache["mask"] = [torch.cat([*cache.get("mask", ()), self.mask], 1)]
        keys = self.mask.shape[1]                                  # no query sees what follows it: (S, keys)
        self.causal = torch.ones(self.size[1], keys, dtype=torch.bool, device=device).tril(keys - self.size[1])
    def pack(self, x):                                             # (B, S, ...) -> (tokens, ...)
        return x.flatten(0, 1).index_select(0, self.index)
    def pad(self, x):                                              # (tokens, ...) -> (B, S, ...), zero at padding
        return x.new_zeros(self.size.numel(), *x.shape[1:]).index_copy(0, self.index, x).unflatten(0, self.size)

class Attention(nn.Module):
    """q, k, v and o under the names their checkpoint has; with fewer key heads, each serves consecutive queries."""
    def __init__(self, names, width, heads, kv_heads, head_dim, dropout, scale=None, bias=False):
        super().__init__()
        self.names, self.heads, self.kv_heads, self.dropout, self.scale = names, heads, kv_heads, dropout, scale
        inner, kv_inner = heads * head_dim, kv_heads * head_dim    # need not be the width
        for name, shape in zip(names, ((width, inner), (width, kv_inner), (width, kv_inner), (inner, width))):
            self.add_module(name, nn.Linear(*shape, bias=bias))
        if scale:                                                  # T5 does not divide by sqrt(D): what q starts from does
            nn.init.normal_(self.get_submodule(names[0]).weight, std=(width * head_dim) ** -0.5)
    def forward(self, x, rows, bias, cache=None, rope=None, memory=None, memory_rows=None):
        """x (tokens, d) attends to itself, or to memory (memory tokens, d); bias broadcasts to (B, H, S, keys)."""
        q, k, v, o = (self.get_submodule(name) for name in self.names)
        heads = lambda x, rows, heads: rows.pad(x).unflatten(-1, (heads, -1)).transpose(1, 2)      # -> (B, heads, S, D)
        queries = heads(q(x), rows, self.heads)
        if memory_rows and cache and self in cache:
            keys, values = cache[self]                             # the memory stays the same
        else:
            source, its_rows = (memory, memory_rows) if memory_rows else (x, rows)
            keys, values = (heads(f(source), its_rows, self.kv_heads) for f in (k, v))
            if rope:
                queries, keys = rotate(queries, *rope), rotate(keys, *rope)
            if cache is not None:
                if self in cache:
                    keys, values = (torch.cat(pair, 2) for pair in zip(cache[self], (keys, values)))
                cache[self] = keys, values
        if self.kv_heads < self.heads:
            keys, values = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (keys, values))
        dropped = self.dropout * self.training
        out = F.scaled_dot_product_attention(queries, keys, values, bias, dropped, scale=self.scale)       # (B, H, S, D)
        return o(rows.pack(out.transpose(1, 2).flatten(2)))

class FeedForward(nn.Module):
    """out(act(in(x))) or, with three names, out(act(in(x)) * gate(x))."""
    def __init__(self, names, width, inner, act, dropout=0.0, bias=False):
        super().__init__()
        self.names, self.act, self.dropout = names, act, nn.Dropout(dropout)
        for name in names:
            self.add_module(name, nn.Linear(*((inner, width) if name == names[-1] else (width, inner)), bias=bias))
    def forward(self, x):
        first, *gate, out = (self.get_submodule(name) for name in self.names)
        h = self.act(first(x))
        return out(self.dropout(h * gate[0](x) if gate else h))

def checkpointed(part, again, *inputs):
    """part(*inputs); again: nothing of what it computes inside is kept, the backward pass computes it again."""
    return torch.utils.checkpoint.checkpoint(part, *inputs, use_reentrant=False) if again and torch.is_grad_enabled() else part(*inputs)
def rotate(x, cos, sin):
    """Rotary positions in the rotate-half form: x (B, H, S, D), cos and sin (B, 1, S, D)."""
    left, right = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-right, left], -1) * sin.to(x.dtype)
def attention_bias(allowed, weight, bias=None):
    """Attention's additive mask, in the type of its queries: bias (or 0) where allowed, elsewhere the lowest finite number."""
    autocast = torch.is_autocast_enabled(weight.device.type)
    dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
    bias = torch.zeros((), dtype=dtype, device=weight.device) if bias is None else bias.to(dtype)
    return torch.where(allowed, bias, torch.finfo(dtype).min)

class LanguageModel(nn.Module):
    """Loss and greedy decoding. T5 and Llama define inputs(), what the decoder reads, and decode(), what it makes of it."""
    def __init__(self, config, defaults):
        super().__init__()
        self.config, self.files = config, {}                       # config.json and the tokenizer's files, to be saved again
        self.c = SimpleNamespace(checkpointing=False, **defaults | {key: value for key, value in config.items() if value is not None})
        self.eos = self.c.eos_token_id if isinstance(self.c.eos_token_id, list) else [self.c.eos_token_id]
        self.pad = self.eos[0] if self.c.pad_token_id is None else self.c.pad_token_id
    def forward(self, input_ids, attention_mask, labels=None):
        """(B, S) ids, mask, labels (-100: ignored) -> logits (B, S, V) and the mean loss, None without labels."""
        ids, real, targets, memory = self.inputs(input_ids, attention_mask, labels)
        hidden, rows = self.decode(ids, real, None, *memory)       # (tokens, d)
        logits = self.lm_head(hidden)                              # (tokens, V)
        loss = None if labels is None else F.cross_entropy(logits.float(), rows.pack(targets.to(logits.device)))
        return rows.pad(logits), loss
    def loss(self, input_ids, attention_mask, labels):
        """The same mean loss, for training: the head runs at labelled positions alone."""
        ids, real, targets, memory = self.inputs(input_ids, attention_mask, labels)
        hidden, rows = self.decode(ids, real, None, *memory)
        targets = targets.flatten()[rows.positions]                # (tokens,)
        labelled = (targets != -100).nonzero().squeeze(1)
        logits = self.lm_head(hidden.index_select(0, send(labelled, hidden.device)))
        return F.cross_entropy(logits.float(), send(targets[labelled], hidden.device))
    @torch.no_grad()
    def generate(self, input_ids, attention_mask, max_new_tokens):
        """Greedy decoding with a cache: (B, S) -> the new ids (B, new), each row as if alone, padded after its end."""
        ids, real, _, memory = self.inputs(input_ids, attention_mask, None)
        device, cache, going, steps = self.lm_head.weight.device, {}, torch.arange(len(ids)), 0    # cache: lists of (B, ...)
        new = torch.full((len(ids), max_new_tokens), self.pad)
        while len(going) and steps < max_new_tokens:               # going: the rows that have not ended
            hidden, rows = self.decode(ids, real, cache, *memory)
            last = real.shape[1] - 1 - real.flip(1).int().argmax(1)            # (B,): each row's last real token
            logits = self.lm_head(rows.pad(hidden)[send(torch.arange(len(last)), device), send(last, device)])     # (B, V)
            ids = new[going, steps] = logits.argmax(-1).cpu()      # the one wait for the device in a step
            more = (~torch.isin(ids, torch.tensor(self.eos))).nonzero().squeeze(1)
            if len(more) < len(going):                             # rows that ended leave the batch
                index = send(more, device)
                for key in cache:
                    cache[key] = [tensor.index_select(0, index) for tensor in cache[key]]
            going, ids, real, steps = going[more], ids[more, None], torch.ones(len(more), 1, dtype=torch.bool), steps + 1
        return new[:, :steps].to(device)

# ---- T5 (Raffel et al. 2020): v1.0 with ReLU and a tied head; v1.1 and Flan with gated GELU and a head of their own
T5_DEFAULTS = dict(feed_forward_proj="relu", num_decoder_layers=None, relative_attention_max_distance=128, dropout_rate=0.1,
                   tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)     # old files lack these
T5_FEED_FORWARD = {"relu": (("wi", "wo"), F.relu), "gated-gelu": (("wi_0", "wi_1", "wo"), nn.GELU("tanh"))}

class T5Stack(nn.Module):
    """Encoder or decoder: self-attention, (decoder) cross-attention, feed-forward, each x + dropout(f(norm(x)))."""
    def __init__(self, c, decoder, layers):
        super().__init__()
        self.c, self.decoder, self.block = c, decoder, nn.ModuleList()
        for _ in range(layers):
            parts = {name: Attention(("q", "k", "v", "o"), c.d_model, c.num_heads, c.num_heads, c.d_kv, c.dropout_rate, scale=1.0)
                     for name in ("SelfAttention", "EncDecAttention")[:1 + decoder]}
            names, act = T5_FEED_FORWARD[c.feed_forward_proj]
            parts["DenseReluDense"] = FeedForward(names, c.d_model, c.d_ff, act, c.dropout_rate)
            self.block.append(nn.ModuleDict({"layer": nn.ModuleList(nn.ModuleDict({
                name: part, "layer_norm": nn.RMSNorm(c.d_model, c.layer_norm_epsilon)}) for name, part in parts.items())}))
        table = nn.Embedding(c.relative_attention_num_buckets, c.num_heads)
        self.block[0].layer[0].SelfAttention.relative_attention_bias = table               # it serves every block
        self.final_layer_norm, self.dropout = nn.RMSNorm(c.d_model, c.layer_norm_epsilon), nn.Dropout(c.dropout_rate)
    def position_bias(self, queries, keys):
        """(1, H, queries, keys): a learned number for each bucket of distances; the queries are the last of the keys."""
        table = self.block[0].layer[0].SelfAttention.relative_attention_bias
        position = torch.arange(keys, device=table.weight.device)
        distance = position[None, :] - position[keys - queries:, None]
        buckets = self.c.relative_attention_num_buckets // (1 if self.decoder else 2)      # the encoder looks both ways
        start = 0 if self.decoder else (distance > 0) * buckets
        distance = -distance.clamp(max=0) if self.decoder else distance.abs()
        exact = buckets // 2                                       # near: a bucket a distance; far: logarithmic
        far = torch.log(distance.clamp(min=1) / exact) / math.log(self.c.relative_attention_max_distance / exact) * (buckets - exact)
        return table(start + torch.where(distance < exact, distance, (exact + far.long()).clamp(max=buckets - 1))).permute(2, 0, 1)[None]
    def forward(self, x, rows, bias, cache=None, memory=None, memory_rows=None, memory_bias=None):
        context = {"SelfAttention": (rows, bias, cache), "DenseReluDense": (),
                   "EncDecAttention": (rows, memory_bias, cache, None, memory, memory_rows)}
        x = self.dropout(x)
        for layer in itertools.chain(*(block.layer for block in self.block)):
            name, part = next(iter(layer.items()))
            x = x + self.dropout(checkpointed(part, self.c.checkpointing, layer.layer_norm(x), *context[name]))
        return self.dropout(self.final_layer_norm(x))

class T5(LanguageModel):
    def __init__(self, config):
        super().__init__(config, T5_DEFAULTS)
        c = self.c
        check(c.feed_forward_proj in T5_FEED_FORWARD, f"feed_forward_proj {c.feed_forward_proj!r} is not supported")
        self.shared = nn.Embedding(c.vocab_size, c.d_model)
        self.encoder = T5Stack(c, False, c.num_layers)
        self.decoder = T5Stack(c, True, c.num_layers if c.num_decoder_layers is None else c.num_decoder_layers)
        self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.shared.weight
        self.scale = c.d_model ** -0.5 if getattr(c, "scale_decoder_outputs", c.tie_word_embeddings) else 1.0      # v1.0 scales
    def inputs(self, input_ids, attention_mask, labels):
        """The labels shifted right, each row up to its last one, and the memory: (tokens, d), its rows, its bias (B, 1, 1, S)."""
        rows = Rows(attention_mask.bool(), self.shared.weight.device)
        allowed, size = rows.mask[:, None, None, :], rows.size[1]
        bias = attention_bias(allowed, self.shared.weight, self.encoder.position_bias(size, size))         # (B, H, S, S)
        memory = self.encoder(self.shared(rows.pack(send(input_ids, rows.mask.device))), rows, bias)
        labels = torch.full((len(input_ids), 1), -100) if labels is None else labels
        real = (labels != -100).flip(1).cumsum(1).flip(1) > 0
        ids = labels.masked_fill(labels == -100, self.pad).roll(1, 1)
        ids[:, 0], real[:, 0] = self.c.decoder_start_token_id, True
        return ids, real, labels, (memory, rows, attention_bias(allowed, self.shared.weight))
    def decode(self, ids, real, cache, memory, memory_rows, memory_bias):
        """The next ids (B, S), and which are real -> (tokens, d) for the head, and their rows."""
        rows = Rows(real, self.shared.weight.device, cache)
        if cache is not None:
            memory_bias, = cache.setdefault("memory_bias", [memory_bias])
        bias = attention_bias(rows.causal, self.shared.weight, self.decoder.position_bias(*rows.causal.shape))
        x = self.shared(rows.pack(send(ids, rows.mask.device)))
        return self.decoder(x, rows, bias, cache, memory, memory_rows, memory_bias) * self.scale, rows

# ---- Llama (Touvron et al. 2023): 1, 2, TinyLlama, any grouped-query model of the family
LLAMA_DEFAULTS = dict(num_key_value_heads=None, head_dim=None, rope_theta=1e4, rope_scaling=None, rope_parameters=None, mlp_bias=False,
                      attention_bias=False, attention_dropout=0.0, tie_word_embeddings=False, pad_token_id=None, eos_token_id=2)

def llama_layer(c):
    return nn.ModuleDict({
        "self_attn": Attention(("q_proj", "k_proj", "v_proj", "o_proj"), c.hidden_size, c.num_attention_heads, c.num_key_value_heads,
                               c.head_dim, c.attention_dropout, bias=c.attention_bias),
        "mlp": FeedForward(("gate_proj", "up_proj", "down_proj"), c.hidden_size, c.intermediate_size, F.silu, bias=c.mlp_bias),
        "input_layernorm": nn.RMSNorm(c.hidden_size, c.rms_norm_eps),
        "post_attention_layernorm": nn.RMSNorm(c.hidden_size, c.rms_norm_eps)})

class Llama(LanguageModel):
    def __init__(self, config):
        super().__init__(config, LLAMA_DEFAULTS)
        c = self.c
        rope = {**(c.rope_scaling or {}), **(c.rope_parameters or {})}
        kind = rope.get("rope_type", rope.get("type", "default"))
        check(kind == "default", f"rope scaling {kind!r} is not supported")
        check(c.hidden_act == "silu", f"hidden_act {c.hidden_act!r} is not supported")
        c.rope_theta = rope.get("rope_theta", c.rope_theta)
        c.head_dim = c.head_dim or c.hidden_size // c.num_attention_heads
        c.num_key_value_heads = c.num_key_value_heads or c.num_attention_heads
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
                                    "layers": nn.ModuleList(llama_layer(c) for _ in range(c.num_hidden_layers)),
                                    "norm": nn.RMSNorm(c.hidden_size, c.rms_norm_eps)})
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
    def inputs(self, input_ids, attention_mask, labels):
        """It reads the ids themselves; a token's target is the label that follows it."""
        return input_ids, attention_mask.bool(), None if labels is None else F.pad(labels[:, 1:], (0, 1), value=-100), ()
    def decode(self, ids, real, cache):
        """The next ids (B, S), padded on either side, and which are real -> (tokens, d) for the head, and their rows."""
        rows = Rows(real, self.lm_head.weight.device, cache)
        half = torch.arange(0, self.c.head_dim, 2, device=rows.mask.device) / self.c.head_dim
        positions = rows.mask.cumsum(1)[:, -rows.size[1]:] - 1     # counted from the row's first real token
        angles = positions[:, None, :, None] * self.c.rope_theta ** -half.repeat(2)        # (B, 1, S, D), fp32
        bias, rope = attention_bias(rows.causal & rows.mask[:, None, None, :], self.lm_head.weight), (angles.cos(), angles.sin())
        x = self.model.embed_tokens(rows.pack(send(ids, rows.mask.device)))
        for layer in self.model.layers:
            x = x + checkpointed(layer.self_attn, self.c.checkpointing, layer.input_layernorm(x), rows, bias, cache, rope)
            x = x + checkpointed(layer.mlp, self.c.checkpointing, layer.post_attention_layernorm(x))
        return self.model.norm(x), rows

# ---- safetensors: 8 bytes of header length, a JSON header, the tensors' bytes
DTYPES = {kind: getattr(torch, name) for kind, name in map(str.split, (                    # all of torch's
    "F32 float32", "BF16 bfloat16", "F16 float16", "F64 float64", "C64 complex64", "BOOL bool", "U8 uint8", "U16 uint16", "U32 uint32",
    "U64 uint64", "I8 int8", "I16 int16", "I32 int32", "I64 int64", "F8_E4M3 float8_e4m3fn", "F8_E5M2 float8_e5m2",
    "F8_E8M0 float8_e8m0fnu", "F8_E4M3FNUZ float8_e4m3fnuz", "F8_E5M2FNUZ float8_e5m2fnuz"))}

def write_file(path, chunks):
    """Write chunks of bytes or text to path, whole or not at all: temporary file, fsync, rename."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            file.writelines(chunk.encode() if isinstance(chunk, str) else chunk for chunk in chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
def write_safetensors(path, tensors, metadata=None):
    """Write a dict of tensors; metadata: text -> text."""
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))        # so that each stays aligned
    header, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": kinds[tensors[name].dtype], "shape": [*tensors[name].shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = (tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for name in names)
    write_file(path, itertools.chain([struct.pack("<Q", len(text)), text], data))

def check(good, fault):
    if not good:
        raise ValueError(fault)
def unique(pairs):
    check(len(dict(pairs)) == len(pairs), "a key stands twice")
    return dict(pairs)
def read_header(buffer):
    """Check all of a file but its numbers: (name -> (dtype, shape, first byte, last + 1), metadata), or ValueError."""
    length = int.from_bytes(buffer[:8], "little")
    check(len(buffer) >= 8 and length <= min(len(buffer) - 8, 100_000_000), "the header's length does not fit the file")
    text = bytes(buffer[8:8 + length])
    check(text.startswith(b"{"), "the header is not a JSON object")
    try:
        sizes = lambda digits: int(digits) if digits[0] != "-" else None       # nothing negative, even -0, is a size
        header = json.loads(text.decode(), object_pairs_hook=unique, parse_int=sizes)
        json.dumps(header, ensure_ascii=False).encode()            # finds halves of surrogate pairs
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header is not JSON: {error}") from None
    metadata = header.pop("__metadata__", None)
    check(metadata is None or isinstance(metadata, dict) and all(isinstance(x, str) for x in metadata.values()), "__metadata__ is not text")
    for name, entry in header.items():
        check(isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}, f"{name}: a wrong entry {entry}")
        check(all(isinstance(entry[key], list) and all(type(n) is int for n in entry[key]) for key in ("shape", "data_offsets")),
              f"{name}: not lists of sizes: {entry}")
        check(entry["dtype"] in [*DTYPES], f"{name}: dtype {entry['dtype']} is none of torch's")
    table, end = {}, 8 + length
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        check(math.prod(n for n in shape if n) < 2 ** 63 and entry["data_offsets"] == [start - 8 - length, end - 8 - length],
              f"{name}: its bytes {entry['data_offsets']} do not fit its shape {shape}, overlap others, or leave a hole")
        table[name] = dtype, shape, start, end
    check(end == len(buffer), f"the tensors end at byte {end}, the file at byte {len(buffer)}")
    return table, metadata
def read_safetensors(path, metadata=None):
    """name -> tensor, memory-mapped; metadata: a dict that receives the file's. ValueError or OSError names file and fault."""
    with open(path, "rb") as file:
        try:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)      # ValueError if the file is empty
            table, found = read_header(buffer)
        except ValueError as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from None
    data, tensors = torch.frombuffer(buffer, dtype=torch.uint8), {}
    for name, (dtype, shape, start, end) in table.items():
        raw = data[start:end] if start % dtype.itemsize == 0 else data[start:end].clone()      # align what a header shifted
        tensors[name] = raw.view(dtype).reshape(shape)
    if metadata is not None:
        metadata.update(found or {})
    return tensors

# ---- folders in Hugging Face form
CLASSES = {"t5": (T5, "T5ForConditionalGeneration", "shared.weight"), "llama": (Llama, "LlamaForCausalLM", "model.embed_tokens.weight")}
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")      # of the embedding, in some files
HARMLESS = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight|.*\.rotary_emb\.inv_freq"
TOKENIZER_FILES = ("spiece.model", "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

def read_json(path):
    """A JSON object. ValueError or OSError names the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        check(isinstance(value, dict), "not an object")
        return value
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
def read_weights(path):
    """All tensors of a folder: model.safetensors, or the shards that its index names."""
    index, tensors = path / "model.safetensors.index.json", {}
    if (path / "model.safetensors").exists():
        return read_safetensors(path / "model.safetensors")
    if not index.exists():
        pickled = "".join(f"; {p.name} is pickled and never opened: convert it to safetensors" for p in path.glob("*.bin"))
        raise FileNotFoundError(f"{path} holds no model.safetensors{pickled}")
    places = read_json(index).get("weight_map")
    check(isinstance(places, dict) and all(isinstance(place, str) and Path(place).name == place for place in places.values()),
          f"{index}: weight_map must map each tensor to the name of a file in this folder")
    for place in sorted(set(places.values())):
        shard = read_safetensors(path / place)
        check(not tensors.keys() & shard.keys(), f"{path / place}: a tensor of it stands in another shard too")
        tensors |= shard
    return tensors

def load_model(path, dtype=torch.float32):
    """A T5 or Llama from a Hugging Face folder (config.json, *.safetensors). ValueError or OSError names the fault."""
    path, config = Path(path), read_json(Path(path) / "config.json")
    kind = str(config.get("model_type"))
    check(kind in CLASSES, f"{path}: model_type {kind} is not supported: only {' and '.join(CLASSES)}")
    tensors = {name: tensor for name, tensor in read_weights(path).items() if not re.fullmatch(HARMLESS, name)}
    if config.get("scale_decoder_outputs") is False and "lm_head.weight" in tensors:
        config["tie_word_embeddings"] = False                      # recent files always say true; the head tells
    new, _, embedding = CLASSES[kind]
    try:
        with torch.device("meta"):                                 # shapes alone, no memory
            model = new(config)
    except (AttributeError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path}: config.json: {error}") from None
    for copy in COPIES:
        if copy in tensors and (model.c.tie_word_embeddings or copy != "lm_head.weight"):
            same = torch.equal(tensors.setdefault(embedding, tensors[copy]), tensors.pop(copy))
            check(same, f"{path}: {copy} differs from {embedding}, to which it is tied")
    found = {name: [*tensor.shape] for name, tensor in tensors.items()}
    expected = {name: [*p.shape] for name, p in model.named_parameters()}      # a tied head counts once
    faults = [f"{name}: {found.get(name, 'missing')} in the file, {expected.get(name, 'unexpected')} by config.json"
              for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    check(not faults, f"{path}: the weights do not fit: {'; '.join(faults)}")
    model.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}, strict=False, assign=True)
    if model.c.tie_word_embeddings:
        model.lm_head.weight = model.get_parameter(embedding)
    model.files = {name: (path / name).read_bytes() for name in TOKENIZER_FILES if (path / name).exists()}
    return model.eval()

def save_model(model, path, metadata=None, tensors=None):
    """Write a folder that from_pretrained opens; tensors: the weights, if not the model's parameters as they are."""
    path, kind = Path(path), "t5" if isinstance(model, T5) else "llama"
    tensors = tensors or dict(model.named_parameters())
    widest = max((tensor.dtype for tensor in tensors.values()), key=lambda dtype: dtype.itemsize)
    config = {**model.config, "model_type": kind, "architectures": [CLASSES[kind][1]]}
    config.pop("dtype", None)
    config["torch_dtype"] = str(widest).removeprefix("torch.")     # transformers loads all in the type written here
    for name, content in {"config.json": json.dumps(config, indent=2), **model.files}.items():
        write_file(path / name, [content])
    write_safetensors(path / "model.safetensors", tensors, metadata)
