"""MUSE's decoders for transformers, without MUSE: inference in floating point.

States are [re | im], (batch, tokens, 2 D). A block adds an attention, and a feed-forward map or, from stage 2
on, what Hamiltonian flows of (q, p) = (re, im) change, each of the normalised state. In stage 3 a Koopman
operator or a MERA router may stand in for an attention, or beside it, and energies correct the logits.
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# What is called a cache was called past_key_values before.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
# Of the convolution of a Koopman operator, and what its decay is sharpened by.
TAPS, SHARPNESS = 4, 8.0


class MuseConfig(PretrainedConfig):
    """Sizes as transformers names them, of real features, and what MUSE's stage says."""

    model_type = "muse"

    def __init__(
        self,
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=48,
        max_position_embeddings=128,
        rope_theta=10000.0,
        norm="rms",
        norm_eps=1e-6,
        activation="split_gelu",
        potential="",
        potential_width=0,
        phi="gelu_integral",
        flows=0,
        context=True,
        confinement=0.5,
        kicks=(),
        drifts=(),
        trunk_kicks=(),
        trunk_drifts=(),
        mixers=(),
        koopman_selective=True,
        mera_levels=0,
        sliding_window=None,
        dialectic="",
        dialectic_units=0,
        dialectic_candidates=0,
        dialectic_rounds=1,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.norm = norm
        self.norm_eps = norm_eps
        self.activation = activation
        self.potential = potential
        self.potential_width = potential_width
        self.phi = phi
        self.flows = flows
        self.context = context
        self.confinement = confinement
        self.kicks = list(kicks)
        self.drifts = list(drifts)
        self.trunk_kicks = list(trunk_kicks)
        self.trunk_drifts = list(trunk_drifts)
        # Names for each layer; empty where all have an attention alone.
        self.mixers = [list(names) for names in mixers]
        self.koopman_selective = koopman_selective
        self.mera_levels = mera_levels
        self.sliding_window = sliding_window
        self.dialectic = dialectic
        self.dialectic_units = dialectic_units
        self.dialectic_candidates = dialectic_candidates
        self.dialectic_rounds = dialectic_rounds
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class MuseRMSNorm(nn.Module):
    """g z / sqrt(mean |z|^2 + eps) with a complex gain g."""

    def __init__(self, size, eps):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2, size // 2))
        self.eps = eps

    def forward(self, x):
        re, im = x.float().chunk(2, -1)
        scale = torch.rsqrt((re.square() + im.square()).mean(-1, keepdim=True) + self.eps)
        re, im = re * scale, im * scale
        g_re, g_im = self.gain.float()
        return torch.cat((re * g_re - im * g_im, re * g_im + im * g_re), -1).to(x.dtype)


class MuseLayerNorm(nn.Module):
    """Whitening of the planes by their covariance over features, then a symmetric 2 x 2 map and a shift."""

    def __init__(self, size, eps):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(3, size // 2))
        self.beta = nn.Parameter(torch.zeros(2, size // 2))
        self.eps = eps

    def forward(self, x):
        re, im = (part - part.mean(-1, keepdim=True) for part in x.float().chunk(2, -1))
        v_rr, v_ii = (part.square().mean(-1, keepdim=True) + self.eps for part in (re, im))
        v_ri = (re * im).mean(-1, keepdim=True)
        s = (v_rr * v_ii - v_ri.square()).sqrt()
        scale = 1 / (s * (v_rr + v_ii + 2 * s).sqrt())
        white_re = scale * ((v_ii + s) * re - v_ri * im)
        white_im = scale * ((v_rr + s) * im - v_ri * re)
        g_rr, g_ii, g_ri = self.gamma.float()
        b_re, b_im = self.beta.float()
        out = (g_rr * white_re + g_ri * white_im + b_re, g_ri * white_re + g_ii * white_im + b_im)
        return torch.cat(out, -1).to(x.dtype)


def build_norm(config):
    """The normalisation that the configuration names."""
    kind = MuseRMSNorm if config.norm == "rms" else MuseLayerNorm
    return kind(config.hidden_size, config.norm_eps)


class MuseAttention(nn.Module):
    """Causal attention of heads [re | im], whose halves the rotary embedding turns."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        # Complex scores are divided by the root of complex channels.
        self.scaling = (config.head_dim // 2) ** -0.5
        self.attention_dropout = 0.0
        self.is_causal = True
        size = config.hidden_size
        self.q_proj = nn.Linear(size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, size, bias=False)

    def forward(self, x, rotary, attention_mask, cache, **kwargs):
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (
            projection(x).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(q, *rotary), rotated(k, *rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        told = {"scaling": self.scaling, "sliding_window": self.config.sliding_window, **kwargs}
        out, _ = attend(self, q, k, v, attention_mask, dropout=0.0, **told)
        return self.o_proj(out.reshape(*x.shape[:-1], -1).contiguous())


def rotated(x, cos, sin):
    """The rotary embedding of (B, H, S, d), whose halves are turned into each other."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class MuseState(DynamicLayer):
    """What a mixer keeps of the tokens, as large after any number of them, as keys and values."""

    is_croppable = False
    length = 0

    def store(self, keys, values, length):
        self.keys, self.values, self.device = keys, values, keys.device
        self.length += length
        self.is_initialized = True

    def get_seq_length(self, *args):
        return self.length

    def reset(self):
        self.keys = self.values = None
        self.length, self.is_initialized = 0, False

    def crop(self, *args):
        raise ValueError("a mixer of stage 3 keeps sums of the tokens, of which none can be taken back")


class MuseKoopman(nn.Module):
    """out(g_t GELU(gate x_t)), g_t = lambda_t g_(t-1) + sqrt(1 - |lambda_t|^2) u_t, u a causal convolution.

    lambda_t = exp(-8 sigmoid(rate x_t) softplus(nu) + i theta).
    """

    def __init__(self, config, slot):
        super().__init__()
        self.slot = slot
        size = config.hidden_size
        self.in_proj = nn.Linear(size, size, bias=False)
        self.gate_proj = nn.Linear(size, size, bias=False)
        self.out_proj = nn.Linear(size, size, bias=False)
        self.rate = nn.Linear(size, size // 2) if config.koopman_selective else None
        self.taps = nn.Parameter(torch.zeros(size // 2, TAPS))
        self.nu = nn.Parameter(torch.zeros(size // 2))
        self.theta = nn.Parameter(torch.zeros(size // 2))

    def forward(self, x, places, cache):
        """Of states (B, S, 2 D) of tokens at ``places``, see ``MuseModel.places``."""
        high = torch.promote_types(x.dtype, torch.float32)
        u, kept = self.in_proj(x), None if cache is None else cache.layers[self.slot]
        # Padding before the tokens adds nothing.
        u = u * (places >= 0).unsqueeze(-1).to(u.dtype)
        if kept is not None and kept.length:
            state, recent = torch.complex(*kept.keys.unbind(1)).unsqueeze(1), kept.values
        else:
            state, recent = 0.0, u.new_zeros(u.shape[0], TAPS - 1, u.shape[2])
        padded = torch.cat((recent, u), 1)
        taps = self.taps.t().repeat(1, 2)
        u = sum(tap * padded[:, at : at + x.shape[1]] for at, tap in enumerate(taps)).to(high)
        rate = 0.5 if self.rate is None else torch.sigmoid(self.rate(x).to(high))
        log = (-SHARPNESS * rate * F.softplus(self.nu.to(high))).expand(*x.shape[:2], -1)
        decay = torch.polar(log.exp(), self.theta.to(high).expand_as(log))
        scale = (-torch.expm1(2 * log)).sqrt()
        g = scanned(decay, torch.complex(*(scale * part for part in u.chunk(2, -1))), state)
        if kept is not None:
            last = g[:, -1]
            # A view would keep all tokens of a prompt alive.
            kept.store(torch.stack((last.real, last.imag), 1), padded[:, 1 - TAPS :].clone(), x.shape[1])
        y = g * torch.complex(*F.gelu(self.gate_proj(x)).to(high).chunk(2, -1))
        return self.out_proj(torch.cat((y.real, y.imag), -1).to(x.dtype))


def scanned(decay, x, state):
    """h_t = decay_t h_(t-1) + x_t of (B, S, K): tiles of tokens side by side, then what they hand on."""
    length = x.shape[1]
    tile = math.isqrt(length - 1) + 1
    behind = (0, 0, 0, -length % tile)
    decay, x = (F.pad(part, behind).unflatten(1, (-1, tile)) for part in (decay, x))
    sums, products = [x[:, :, 0]], [decay[:, :, 0]]
    for at in range(1, tile):
        sums.append(decay[:, :, at] * sums[-1] + x[:, :, at])
        products.append(decay[:, :, at] * products[-1])
    out = []
    for own, product in zip(torch.stack(sums, 2).unbind(1), torch.stack(products, 2).unbind(1), strict=True):
        out.append(own + product * state)
        state = out[-1][:, -1:]
    return torch.cat(out, 1)[:, :length]


class MuseRouter(nn.Module):
    """out(y_t GELU(gate x_t)), y_t a sum of nodes of a tree of the past: two a level, weighed for each head.

    From a level to the next, of nodes x_k: a rotation of x_(2k+1) and x_(2k+2) with angles theta and g, and
    then sums of x_(2k) and x_(2k+1) with angles phi, a and b. Node k of level l has tokens up to
    2^l k + 2^(l+1) - 2.
    """

    def __init__(self, config, slot):
        super().__init__()
        self.slot, self.heads, self.levels = slot, config.num_attention_heads, config.mera_levels
        size = config.hidden_size
        self.in_proj = nn.Linear(size, size, bias=False)
        self.gate_proj = nn.Linear(size, size, bias=False)
        self.out_proj = nn.Linear(size, size, bias=False)
        self.router = nn.Linear(size, 2 * self.heads * (self.levels + 1))
        self.disentanglers = nn.Parameter(torch.zeros(self.levels, size))
        self.isometries = nn.Parameter(torch.zeros(self.levels, 3 * (size // 2)))

    def forward(self, x, places, cache):
        """Of states (B, S, 2 D) of tokens at ``places``, see ``MuseModel.places``."""
        high = torch.promote_types(x.dtype, torch.float32)
        leaves = torch.complex(*self.in_proj(x).to(high).chunk(2, -1))
        kept = None if cache is None else cache.layers[self.slot]
        length = x.shape[1] + (0 if kept is None else kept.length)
        levels = 1 + min(self.levels, (length + 1).bit_length() - 2)
        weights = self.weights(self.router(x).to(high), places.clamp(min=0), levels)
        if kept is None or not kept.length:
            y, state = self.read_all(leaves, places, weights)
        else:
            y, state = self.read_on(leaves, places, weights, kept.keys, kept.values)
        if kept is not None:
            kept.store(*state, x.shape[1])
        y = y * torch.complex(*F.gelu(self.gate_proj(x)).to(high).chunk(2, -1))
        return self.out_proj(torch.cat((y.real, y.imag), -1).to(x.dtype))

    def weights(self, logits, places, levels):
        """Of nodes, (B, S, levels, 2, H, 1), the newest one of a level first."""
        logits = logits.unflatten(-1, (self.heads, -1))[..., : 2 * levels].transpose(2, 3)
        slots = torch.arange(2 * levels, device=logits.device)
        missing = newest(places.unsqueeze(-1), slots // 2) < slots % 2
        weights = logits.masked_fill(missing.unsqueeze(-1), -math.inf).softmax(2)
        return weights.unflatten(2, (levels, 2)).unsqueeze(-1)

    def read_all(self, leaves, places, weights):
        """What tokens read that none comes before, (B, S, D), and the state after them."""
        batch, length = leaves.shape[:2]
        row = torch.arange(batch, device=leaves.device).unsqueeze(1)
        # Without the padding before them; nobody reads what is behind them then.
        at = torch.arange(length, device=leaves.device) + (places < 0).sum(1, keepdim=True)
        nodes = leaves[row, at.clamp(max=length - 1)]
        seen, y, recent, first = places.clamp(min=0), 0.0, [], []
        for level in range(weights.shape[2]):
            own, count = newest(seen, level), newest(places[:, -1:], level) + 1
            for before in (0, 1):
                read = nodes[row, (own - before).clamp(min=0)].unflatten(-1, (self.heads, -1))
                y = y + weights[:, :, level, before] * read
                recent.append(nodes[row, (count - 1 - before).clamp(min=0)])
            firsts, nodes = self.coarser(nodes, level)
            first.append(firsts[row, ((count - 1) // 2).clamp(min=0)])
        state = torch.cat(recent, 1).unflatten(1, (-1, 2)), torch.cat(first, 1)
        return y.flatten(2), state

    def read_on(self, leaves, places, weights, recent, first):
        """What tokens read that follow those of a state, one after another, and the state after them."""
        levels = weights.shape[2]
        recent = F.pad(recent, (0, 0, 0, 0, 0, levels - recent.shape[1]))
        first = F.pad(first, (0, 0, 0, levels - first.shape[1]))
        out = []
        for at in range(leaves.shape[1]):
            node, place, recents, firsts = leaves[:, at], places[:, at], [], []
            for level in range(levels):
                number = newest(place, level)
                ends = ((number + 2 << level == place + 2) & (number >= 0)).unsqueeze(-1)
                own, odd = recent[:, level], (number % 2 == 1).unsqueeze(-1)
                pair = torch.stack((first[:, level], own[:, 0], node), 1)
                after, made = self.coarser(pair, level)
                after = torch.where((number == 0).unsqueeze(-1), node, after[:, -1])
                firsts.append(torch.where(ends & ~odd, after, first[:, level]))
                moved = torch.stack((node, own[:, 0]), 1)
                recents.append(torch.where(ends.unsqueeze(-1), moved, own))
                node = made[:, 0]
            recent, first = torch.stack(recents, 1), torch.stack(firsts, 1)
            nodes = recent.unflatten(-1, (self.heads, -1))
            out.append((weights[:, at] * nodes).sum((1, 2)).flatten(1))
        return torch.stack(out, 1), (recent, first)

    def coarser(self, nodes, level):
        """Of nodes (B, n, D): the first of each pair as it is summed, and one more; and the sums."""
        pairs = (nodes.shape[1] - 1) // 2
        left, right = nodes[:, 1 : 2 * pairs : 2], nodes[:, 2 : 2 * pairs + 1 : 2]
        if level == self.levels:
            return nodes[:, : pairs + 1], left
        theta, g = self.disentanglers[level].to(nodes.real.dtype).chunk(2)
        phi, a, b = self.isometries[level].to(nodes.real.dtype).chunk(3)
        along, across = theta.cos(), torch.polar(theta.sin(), g)
        left, right = along * left + across * right, along * right - across.conj() * left
        firsts = torch.cat((nodes[:, :1], right), 1)
        one, two = torch.polar(phi.cos(), a), torch.polar(phi.sin(), b)
        return firsts, one * firsts[:, :-1] + two * left


def newest(place, level):
    """The last node of a level that has no token after a place; negative where there is none."""
    return (place + 2 >> level) - 2


class MuseMLP(nn.Module):
    """down(activation(up x))."""

    def __init__(self, config):
        super().__init__()
        self.kind = config.activation
        size, hidden = config.hidden_size, config.intermediate_size
        self.up_proj = nn.Linear(size, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, size, bias=False)
        gates = {"mod_relu": 1, "mod_swish": 2}.get(self.kind, 0)
        self.gates = nn.Parameter(torch.zeros(gates, hidden // 2)) if gates else None

    def forward(self, x):
        hidden = self.up_proj(x)
        if self.kind == "split_gelu":
            return self.down_proj(F.gelu(hidden))
        re, im = hidden.chunk(2, -1)
        if self.kind == "z_relu":
            gate = ((re > 0) & (im > 0)).to(hidden.dtype)
        else:
            size = torch.hypot(re, im).clamp_min(torch.finfo(hidden.dtype).tiny)
            if self.kind == "mod_relu":
                gate = F.relu(size + self.gates[0]) / size
            elif self.kind == "mod_swish":
                gate = torch.sigmoid(self.gates[1] * size + self.gates[0])
            else:
                gate = 0.5 * (1 + re / size)
        return self.down_proj(torch.cat((re * gate, im * gate), -1))


class MusePotential(nn.Module):
    """The force of V(q), of each token by itself."""

    def __init__(self, config):
        super().__init__()
        channels, hidden = config.hidden_size // 2, config.potential_width
        self.kind, self.phi, self.confinement = config.potential, config.phi, config.confinement
        if self.kind == "duffing":
            self.stiffness = nn.Parameter(torch.ones(channels))
            self.quartic = nn.Parameter(torch.zeros(channels))
            return
        self.w1 = nn.Parameter(torch.zeros(hidden, channels))
        self.b1 = nn.Parameter(torch.zeros(hidden))
        self.w2 = nn.Parameter(torch.zeros(hidden))
        self.context_weight = nn.Parameter(torch.zeros(hidden, 2 * channels)) if config.context else None

    def field(self, q, p):
        """The force as a function of q, of tokens whose flow starts at (q, p)."""
        if self.kind == "duffing":
            return lambda q: -q * (self.stiffness + self.quartic.abs() * q.square())
        bias = self.b1
        if self.context_weight is not None:
            bias = F.linear(torch.cat((q, p), -1), self.context_weight, bias)
        outward = -self.w2.abs().unsqueeze(1) * self.w1

        def force(q):
            return self.slope(F.linear(q, self.w1) + bias) @ outward - self.confinement * q

        return force

    def slope(self, a):
        """phi'(a)."""
        if self.phi == "gelu_integral":
            return F.gelu(a)
        if self.phi == "silu":
            sigmoid = torch.sigmoid(a)
            return sigmoid * (1 + a * (1 - sigmoid))
        if self.phi == "gelu":
            density = torch.exp(-0.5 * a.square()) / (2 * torch.pi) ** 0.5
            return 0.5 * (1 + torch.erf(a * 0.5**0.5)) + a * density
        return torch.sigmoid(a)


class MuseFlow(nn.Module):
    """What flows change of (q, p) = (re, im), each of them on the state of the one before times i."""

    def __init__(self, config):
        super().__init__()
        self.potentials = nn.ModuleList(MusePotential(config) for _ in range(config.flows))
        self.stages = list(zip(config.kicks, config.drifts, strict=True))

    def forward(self, x):
        q, p = x.chunk(2, -1)
        for number, potential in enumerate(self.potentials):
            if number:
                q, p = -p, q
            force = potential.field(q, p)
            for kick, drift in self.stages:
                if kick:
                    p = p + kick * force(q)
                if drift:
                    q = q + drift * p
        for _ in self.potentials[1:]:
            q, p = p, -q
        return torch.cat((q, p), -1) - x


class MuseLayer(nn.Module):
    """Two sub-layers, each of a normalised state; the first one is a sum of mixers."""

    def __init__(self, config, layer_idx):
        super().__init__()
        slots = mixer_slots(config)[layer_idx]
        self.attention_norm = build_norm(config)
        self.self_attn = MuseAttention(config, layer_idx) if "attention" in slots else None
        self.koopman = MuseKoopman(config, slots["koopman"]) if "koopman" in slots else None
        self.mera = MuseRouter(config, slots["mera"]) if "mera" in slots else None
        self.mlp_norm = build_norm(config)
        self.mlp = MuseFlow(config) if config.flows else MuseMLP(config)

    def mix(self, x, rotary, attention_mask, places, cache, **kwargs):
        parts = []
        if self.self_attn is not None:
            parts.append(self.self_attn(x, rotary, attention_mask, cache, **kwargs))
        parts += [part(x, places, cache) for part in (self.koopman, self.mera) if part is not None]
        return sum(parts[1:], parts[0])


def mixer_slots(config):
    """For each layer the mixers by their names, and which layer of a cache each of them has.

    A layer's first one has that of its own number, others have those behind the last layer.
    """
    if not config.mixers:
        return [{"attention": number} for number in range(config.num_hidden_layers)]
    slots, behind = [], config.num_hidden_layers
    for number, (first, *others) in enumerate(config.mixers):
        slots.append({first: number, **{name: behind + at for at, name in enumerate(others)}})
        behind += len(others)
    return slots


class MusePreTrainedModel(PreTrainedModel):
    """What transformers asks of the classes below."""

    config_class = MuseConfig
    base_model_prefix = "model"
    _no_split_modules = ["MuseLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class MuseModel(MusePreTrainedModel):
    """Embedding, layers, norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MuseLayer(config, number) for number in range(config.num_hidden_layers))
        self.norm = build_norm(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def rotary(self, position_ids, dtype):
        half = self.config.head_dim // 2
        rates = self.config.rope_theta ** (-torch.arange(half, device=position_ids.device).double() / half)
        angles = position_ids[..., None].double() * rates
        cos, sin = (
            torch.cat((part, part), -1).to(dtype).unsqueeze(1) for part in (angles.cos(), angles.sin())
        )
        return cos, sin

    def places(self, attention_mask, columns):
        """Of tokens among those that are no padding, (B, S) or (1, S); -1 for padding before them.

        Padding behind them may have any place: nothing can follow it.
        """
        if attention_mask is None:
            return columns[None]
        if attention_mask.ndim != 2:
            raise ValueError("the mixers of stage 3 take an attention mask of (batch, tokens) only")
        return (attention_mask.long().cumsum(1) - 1)[:, -len(columns) :]

    def prepare_cache(self, cache):
        """Have a state in place of keys and values where a mixer is no attention."""
        if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
            raise ValueError("the mixers of stage 3 go with dynamic caches only")
        for slots in mixer_slots(self.config):
            for name, slot in slots.items():
                cache.layers.extend(DynamicLayer() for _ in range(slot + 1 - len(cache.layers)))
                if name != "attention" and not isinstance(cache.layers[slot], MuseState):
                    cache.layers[slot] = MuseState()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        cache=None,
        **kwargs,
    ):
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        config = self.config
        if "attention_instances" in kwargs and (config.mixers or config.dialectic or config.sliding_window):
            raise ValueError("vLLM has neither the caches of stage 3 nor its head, and cannot run this model")
        if config.mixers and cache is not None:
            self.prepare_cache(cache)
        start = cache.get_seq_length() if cache is not None else 0
        columns = torch.arange(start, start + x.shape[1], device=x.device)
        if position_ids is None:
            position_ids = columns[None]
        places = self.places(attention_mask, columns) if config.mixers else None
        told = {
            "config": config,
            "inputs_embeds": x,
            "input_embeds": x,
            "attention_mask": attention_mask,
            "cache_position": columns,
            CACHE: cache,
            "position_ids": position_ids,
        }
        masking = create_sliding_window_causal_mask if config.sliding_window else create_causal_mask
        known = inspect.signature(masking).parameters
        mask = masking(**{name: value for name, value in told.items() if name in known})
        rotary = self.rotary(position_ids, x.dtype)
        # Of a trunk with a momentum v: v += kick f(norm x), x += drift v.
        schedule = iter(zip(config.trunk_kicks, config.trunk_drifts, strict=True))
        momentum = 0.0
        for layer in self.layers:
            for norm in (layer.attention_norm, layer.mlp_norm):
                normal = norm(x)
                if norm is layer.attention_norm:
                    change = layer.mix(normal, rotary, mask, places, cache, **kwargs)
                else:
                    change = layer.mlp(normal)
                if config.trunk_kicks:
                    kick, drift = next(schedule)
                    momentum = momentum + kick * change
                    change = drift * momentum
                x = x + change
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **{CACHE: cache})


class MuseAntithesis(nn.Module):
    """Logits minus energies of the likeliest tokens: r . f(A x + B e + C m + b) / sqrt(units).

    e is a token's row in the head at a root mean square of 1, m the mean of B e by the tokens' shares.
    """

    def __init__(self, config):
        super().__init__()
        units, size = config.dialectic_units, config.hidden_size
        self.kind, self.candidates = config.dialectic, config.dialectic_candidates
        self.rounds = config.dialectic_rounds
        self.state_weight = nn.Parameter(torch.zeros(units, size))
        self.token_weight = nn.Parameter(torch.zeros(units, size))
        self.mean_weight = nn.Parameter(torch.zeros(units, units))
        self.bias = nn.Parameter(torch.zeros(units))
        self.readout = nn.Parameter(torch.zeros(units))

    def forward(self, states, logits, matrix):
        high = torch.promote_types(states.dtype, torch.float32)
        thesis, tokens = logits.to(high).topk(min(self.candidates, logits.shape[-1]), -1)
        rows = F.embedding(tokens, matrix).to(high)
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-12)
        seen = F.linear(rows.to(states.dtype), self.token_weight).to(high)
        own = F.linear(states, self.state_weight).to(high) + self.bias.to(high)
        energies = torch.zeros_like(thesis)
        for _ in range(self.rounds):
            share = torch.softmax(thesis - energies, -1).unsqueeze(-1)
            mean = F.linear((share * seen).sum(-2).to(states.dtype), self.mean_weight).to(high)
            value = self.value(seen + (own + mean).unsqueeze(-2))
            energies = (value * self.readout.to(high)).sum(-1) * len(self.readout) ** -0.5
        return logits.to(high).scatter(-1, tokens, thesis - energies)

    def value(self, a):
        if self.kind == "mlp":
            return F.gelu(a)
        q, p = a.chunk(2, -1)
        # The integral of GELU.
        share = 0.5 * (1 + torch.erf(q * 0.5**0.5))
        density = torch.exp(-0.5 * q.square()) / (2 * torch.pi) ** 0.5
        return torch.cat((0.5 * ((q.square() - 1) * share + q * density), p.square() / 2), -1)


class MuseForCausalLM(MusePreTrainedModel, GenerationMixin):
    """The decoder with its head."""

    def __init__(self, config):
        super().__init__(config)
        # No token of a state can be taken back.
        self._is_stateful = bool(config.mixers)
        self.model = MuseModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.antithesis = MuseAntithesis(config) if config.dialectic else None
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        cache=None,
        **kwargs,
    ):
        cache = past_key_values if cache is None else cache
        found = self.model(input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, **kwargs)
        states = found.last_hidden_state
        if isinstance(logits_to_keep, int):
            states = states[:, -logits_to_keep:] if logits_to_keep else states
        else:
            states = states[:, logits_to_keep]
        logits = self.lm_head(states)
        if self.antithesis is not None:
            logits = self.antithesis(states, logits, self.lm_head.weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: found.get(CACHE)})
