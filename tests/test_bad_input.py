"""Every argument of every public function, given everything on one list of wrong things."""

from __future__ import annotations

import functools
import re
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import batch, sdxl, small
from torch import Tensor, nn

import ncp_loss
from ncp_loss import FlowSchedule, NoiseSchedule
from ncp_loss import NoiseConditionedPerceptualLoss as NCP
from ncp_loss.objectives import LOSS_TYPES

# What is given in place of a good argument: each is a function of the good one.


class Marked(Tensor):
    """A subclass of Tensor that adds nothing."""


class OtherModel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Tiny(nn.Module):
    """A model that is called like a U-Net and is no more than its first layer, so that losses on it are quick."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        return self.conv_in(x)


@functools.cache
def scripted() -> nn.Module:
    return torch.jit.script(OtherModel())


def tensor(good: Any) -> Tensor:
    return good.detach() if isinstance(good, Tensor) else torch.tensor([1.0, 2.0])


def floating(good: Any) -> Tensor:
    x = tensor(good)
    return x if x.is_floating_point() else x.float()


def typo(good: Any) -> Any:
    return good + "s" if isinstance(good, str) else "typo"


WRONG: dict[str, Callable[[Any], Any]] = {
    **{
        name: lambda _, value=value: value
        for name, value in {
            "None": None,
            "True": True,
            "no text": "",
            "digits": "1",
            "bytes": b"1",
            "list": [1.0, 2.0],
            "empty list": [],
            "ragged list": [[1.0], [2.0, 3.0]],
            "list of None": [None],
            "list of text": ["a", "b"],
            "dict": {"a": 1},
            "set": {1, 2},
            "Decimal": Decimal("0.25"),
            "complex": 2j,
            "NaN": float("nan"),
            "inf": float("inf"),
            "-inf": -float("inf"),
            "negative": -3,
            "zero": 0,
            "fraction": 0.25,
            "whole": 2,
            "huge": 10**400,
            "object": object(),
            "callable": len,
            "class": dict,
            "slice": slice(2),
            "NumPy generator": np.random.default_rng(0),
            "dtype of integers": torch.int64,
            "dtype of one byte": torch.float8_e5m2,
            "device": torch.device("cpu"),
            "NumPy array": np.ones(2),
            "NumPy float": np.float32(0.25),
            "NumPy int": np.int64(2),
            "NumPy NaN": np.float64("nan"),
            "NumPy bool": np.bool_(True),
            "Fraction": Fraction(1, 4),
            "model": OtherModel(),
        }.items()
    },
    "generator": lambda _: torch.Generator(),
    "Python generator": lambda _: (x for x in "ab"),
    "ScriptModule": lambda _: scripted(),
    "a list of it": lambda good: [good],
    "typo": typo,
    # tensors
    "0-dim": lambda _: torch.tensor(0.25),
    "0-dim NaN": lambda _: torch.tensor(float("nan")),
    "0-dim meta": lambda _: torch.tensor(0.25, device="meta"),
    "of two": lambda _: torch.tensor([0.25, 2.0]),
    "no rows": lambda good: tensor(good)[:0],
    "one row fewer": lambda good: tensor(good)[1:],
    "one row more": lambda good: torch.cat([tensor(good), tensor(good)[:1]]),
    "without rows": lambda good: tensor(good)[0],
    "with a rank more": lambda good: tensor(good)[:, None],
    "with a rank before": lambda good: tensor(good)[None],
    "narrower": lambda good: tensor(good).unsqueeze(-1).expand(*tensor(good).shape, 3),
    "of complex": lambda good: tensor(good) * 1j,
    "of bool": lambda good: tensor(good).bool(),
    "of int64": lambda good: tensor(good).long(),
    "of uint8": lambda good: tensor(good).byte(),
    "of uint16": lambda good: tensor(good).to(torch.uint16),
    "of float8": lambda good: floating(good).to(torch.float8_e4m3fn),
    "of NaN": lambda good: torch.full_like(floating(good), float("nan")),
    "of inf": lambda good: torch.full_like(floating(good), float("inf")),
    "below all": lambda good: torch.full_like(floating(good), -3.0),
    "halves": lambda good: torch.full_like(floating(good), 0.5),
    "sparse": lambda good: tensor(good).to_sparse(),
    "nested": lambda good: torch.nested.nested_tensor([*tensor(good)]),
    "jagged": lambda good: torch.nested.nested_tensor([x.reshape(-1) for x in tensor(good)], layout=torch.jagged),
    "quantised": lambda good: torch.quantize_per_tensor(floating(good).float(), 0.1, 0, torch.qint8),
    "on meta": lambda good: tensor(good).to("meta"),
    "NumPy array of it": lambda good: tensor(good).numpy(),
    "list of its values": lambda good: tensor(good).tolist(),
    "requires grad": lambda good: floating(good).clone().requires_grad_(),
    "subclass": lambda good: tensor(good).as_subclass(Marked),
    "parameter": lambda good: nn.Parameter(floating(good), requires_grad=False),
    "in other strides": lambda good: torch.stack([tensor(good)] * 2, -1)[..., 0],
}

# What is right all the same, by the kind of argument.
NUMBER = {"fraction", "whole", "NumPy float", "NumPy int", "Fraction", "0-dim", "without rows"}
NOT_NEGATIVE = NUMBER | {"zero"}
ANY_NUMBER = NOT_NEGATIVE | {"negative"}
WHOLE = {"whole"}
DENSE = {"requires grad", "subclass", "parameter", "in other strides"}
ROWS = DENSE | {"of NaN", "of inf", "below all", "halves"}  # data, whose values are its own affair
TIMES = DENSE | {"of int64", "of uint8"}
FLAG = {"True"}
GENERATOR = {"None", "generator"}
SHAPES = {
    "no rows",
    "one row fewer",
    "one row more",
    "without rows",
    "with a rank more",
    "with a rank before",
    "narrower",
}
# Numbers, for arguments that are none; of others, what is right is compared with the good value or with itself.
EQUIVALENT = {"NumPy float": 0.25, "NumPy int": 2, "Fraction": 0.25, "0-dim": 0.25, "without rows": 1.0}
NOT_COMPARED = {
    "on meta",
    "0-dim NaN",
    "0-dim meta",
    "of NaN",
    "of inf",
    "below all",
    "halves",
    "generator",
    "callable",
    "class",
    "model",
    "ScriptModule",
}


class Argument(NamedTuple):
    """A good value, what else is right, and the name that messages give it."""

    good: Any
    right: Iterable[str] = ()
    named: str = ""
    equivalent: Mapping[str, Any] = {}


class Use(NamedTuple):
    """A public function with good arguments."""

    id: str
    call: Callable[..., Any]
    arguments: Mapping[str, Argument]
    tried: Iterable[str] = ()  # of these; without any, all


@functools.cache
def unet() -> nn.Module:
    return small(torch.float32)


@functools.cache
def ncp() -> NCP:
    return NCP(unet())


@functools.cache
def tiny() -> NCP:
    return NCP(Tiny().requires_grad_(False), "conv_in")


@functools.cache
def xl() -> NCP:
    return NCP(sdxl(dtype=torch.float32), "down_blocks.0")


def errors_of(built: NCP) -> Tensor:
    return built.errors(**batch(unet())).error


def values(result: Any) -> list[Any]:
    """What a result says, as a list of tensors and plain objects."""
    if isinstance(result, NCP):
        return [errors_of(result)]
    if isinstance(result, NoiseSchedule):
        t = torch.arange(len(result))
        return [*result.reverse_step(t)[:3], result.prediction_type]
    if isinstance(result, Mapping):
        return [x for key in result for x in values(result[key])]
    if isinstance(result, tuple | list):
        return [x for item in result for x in values(item)]
    return [] if result is None else [result]


def agree(one: Any, two: Any) -> bool:
    a, b = values(one), values(two)
    return len(a) == len(b) and all(
        bool(x.isfinite().all()) and torch.allclose(x.double(), y.double(), rtol=1e-5)
        if isinstance(x, Tensor) and isinstance(y, Tensor)
        else x == y
        for x, y in zip(a, b, strict=True)
    )


def exists(kind: str, good: Any) -> bool:
    """Whether there is such a thing: what has no rows cannot have one fewer."""
    try:
        WRONG[kind](good)
    except (RuntimeError, IndexError, TypeError):
        return False
    return True


def is_told(error: Exception, name: str) -> bool:
    """Whether a refusal names the argument, what it must be and what it was."""
    told = re.search(rf"(?<!\w)({name})(?!\w)", str(error)) and re.search(
        " must (be|have) .*; it was .", str(error), re.S
    )
    return bool(told) and type(error) in (ValueError, TypeError)


def complaint(call: Callable[..., Any], good: Mapping[str, Any], name: str, argument: Argument, kind: str) -> str:
    """What is wrong with what a call makes of a wrong argument; nothing, where it is refused by name or right."""
    if not exists(kind, argument.good):
        return ""
    wrong = WRONG[kind](argument.good)
    right = kind in argument.right
    try:
        result = call(**{**good, name: wrong})
    except Exception as error:
        told = f"{type(error).__name__}: {str(error)[:200]}"
        return told if right or not is_told(error, argument.named or name) else ""
    if not right:
        return f"accepted, with {str(result)[:60]}"
    if kind in NOT_COMPARED or (kind == "no rows" and isinstance(argument.good, Tensor)):
        return ""
    numbers = {} if isinstance(argument.good, Tensor) and kind in SHAPES | {"0-dim"} else EQUIVALENT
    same = argument.good if isinstance(argument.good, Tensor) and kind in DENSE | TIMES else wrong
    equivalent = argument.equivalent.get(kind, numbers.get(kind, same))
    return "" if agree(result, call(**{**good, name: equivalent})) else f"not right: {str(result)[:60]}"


# The public functions.

E = {
    name: Argument(torch.tensor(v), ROWS)
    for name, v in (("chosen_error", [0.1, 0.2, 0.3, 0.4]), ("rejected_error", [0.4, 0.3, 0.2, 0.1]))
}
REF = {f"ref_{name}": Argument(argument.good + 0.1, ROWS) for name, argument in E.items()}
REDUCTION = Argument("mean")
BETA = Argument(2.0, NUMBER - {"0-dim", "without rows"})
BETAS_EACH = Argument(torch.tensor([1.0, 2.0, 3.0, 4.0]), set(BETA.right) | DENSE | {"halves"})
WEIGHT = Argument(1.0, NOT_NEGATIVE)
LIKED = Argument(torch.tensor([True, False, True, False]), {"of bool", "subclass", "in other strides"})


def every_loss_type(**arguments: Any) -> list[Tensor]:
    smoothed = {"label_smoothing": arguments.pop("label_smoothing")}
    return [
        ncp_loss.dpo_loss(**arguments, loss_type=name, **(smoothed if name in ("sigmoid", "robust") else {}))
        for name in LOSS_TYPES
    ]


DPO = {
    **E,
    **REF,
    "beta": BETA,
    "label_smoothing": Argument(0.1, NOT_NEGATIVE - {"whole", "NumPy int", "without rows"}),
    "sft_weight": WEIGHT,
    "reduction": REDUCTION,
}
KTO = {
    "error": E["chosen_error"],
    "ref_error": E["rejected_error"],
    "desirable": LIKED,
    "beta": BETA,
    "kl": Argument(0.1, ANY_NUMBER | {"None"}),
    "desirable_weight": WEIGHT,
    "undesirable_weight": WEIGHT,
    "reduction": REDUCTION,
}
USES = [
    Use("dpo_loss", every_loss_type, DPO),
    Use("dpo_loss, beta for each pair", every_loss_type, {**DPO, "beta": BETAS_EACH}, ["beta"]),
    Use("dpo_loss, one loss_type", ncp_loss.dpo_loss, {**E, **REF, "loss_type": Argument("sigmoid")}, ["loss_type"]),
    Use("relative_beta", ncp_loss.relative_beta, {**REF, "kappa": Argument(2.0, NUMBER)}),
    Use("cpo_loss", ncp_loss.cpo_loss, {**E, "beta": BETA, "sft_weight": WEIGHT, "reduction": REDUCTION}),
    Use(
        "sft_loss",
        ncp_loss.sft_loss,
        {
            "chosen_error": Argument(
                E["chosen_error"].good, ROWS | {"of two", "one row fewer", "one row more", "on meta"}
            ),
            "reduction": REDUCTION,
        },
    ),
    Use(
        "mapo_loss",
        ncp_loss.mapo_loss,
        {**E, "beta": BETA, "scale": Argument(0.5, NUMBER), "steps": Argument(1000, NUMBER), "reduction": REDUCTION},
    ),
    Use("kto_loss", ncp_loss.kto_loss, KTO),
    Use(
        "preference_metrics",
        ncp_loss.preference_metrics,
        {
            "loss": Argument(
                torch.tensor([0.5, 0.7]), ROWS | (SHAPES - {"no rows"}) | {"0-dim", "0-dim NaN", "of two"}
            ),
            **E,
            "ref": Argument(tuple(a.good for a in REF.values()), {"None"}, "ref|ref_chosen_error"),
            "beta": BETAS_EACH,
        },
    ),
    Use(
        "by_timestep",
        ncp_loss.by_timestep,
        {
            "values": Argument(torch.tensor([1.0, 2.0, 3.0]), ROWS),
            "timesteps": Argument(torch.tensor([1, 3, 5]), TIMES | {"of inf", "below all", "halves"}),
            "edges": Argument((0, 2, 4, 6), {"list", "list of its values"}),
        },
    ),
]


CONSTRUCTOR = {
    "unet": Argument(unet(), named="unet|layer"),
    "layer": Argument("down_blocks", {"a list of it"}, equivalent={"a list of it": "down_blocks"}),
    "schedule": Argument(NoiseSchedule.from_scheduler(None), {"None"}),
    "step": Argument(1, WHOLE),
    "difference": Argument("auto"),
    "normalize": Argument(False, FLAG),
    "weighting": Argument("noise", {"None"}),
    "checkpoint": Argument(False, FLAG),
    "chunk_size": Argument(1, WHOLE | {"None"}),
    "call": Argument(
        lambda model, x, t, **kw: model(x, t, **kw), {"None", "callable", "class", "model", "ScriptModule"}
    ),
    "impl": Argument("eager"),
    "reduction": REDUCTION,
}
ARGUMENTS = batch(unet(), timesteps=[10, 50])
TWO = {name: Argument(ARGUMENTS[name], ROWS) for name in ("model_pred", "target", "noisy_latents")}
TWO["timesteps"] = Argument(
    ARGUMENTS["timesteps"], TIMES | {"without rows"}, equivalent={"without rows": torch.tensor([10, 10])}
)
TWO["encoder_hidden_states"] = Argument(ARGUMENTS["encoder_hidden_states"], ROWS)
DRAWS = {
    "variance_noise": Argument(ARGUMENTS["variance_noise"], ROWS | {"None"}),
    "generator": Argument(None, GENERATOR),
}
ERRORS = {
    **TWO,
    **DRAWS,
    "ref_pred": Argument(ARGUMENTS["ref_pred"], ROWS | {"None"}),
    "pairs": Argument(False, named="pairs|both members of a pair"),
}
XL_ARGUMENTS = batch(sdxl(dtype=torch.float32), timesteps=[10, 50])
ADDED = XL_ARGUMENTS.pop("added_cond_kwargs")


def of_xl(**added: Any) -> Any:
    return xl().errors(**XL_ARGUMENTS, added_cond_kwargs=added.pop("added_cond_kwargs", added))


PAIR = batch(unet(), pairs=True, timesteps=[10, 50])
PAIRS = {name: Argument(PAIR[name], TWO[name].right) for name in TWO}
PAIRS["encoder_hidden_states"] = Argument(
    PAIR["encoder_hidden_states"], ROWS | {"None", "with a rank more", "narrower"}
)
PAIRS["timesteps"] = Argument(
    PAIR["timesteps"], TIMES | {"without rows"}, equivalent={"without rows": torch.tensor([10] * 4)}
)
BETA_OF_TWO = Argument(2.0, {*BETA.right, *DENSE, "of two", "halves"})
PAIRS |= {"variance_noise": Argument(PAIR["variance_noise"], ROWS | {"None"}), "generator": Argument(None, GENERATOR)}
PAIRS |= {"ncp": Argument(tiny()), "reduction": REDUCTION}
USES += [
    Use("NoiseConditionedPerceptualLoss", NCP, CONSTRUCTOR),
    Use(
        "NoiseConditionedPerceptualLoss: layers by weight",
        lambda weight: NCP(unet(), {"mid_block": weight}),
        {"weight": Argument(1.0, NUMBER, "layer")},
    ),
    Use("ncp", lambda **given: ncp()(**given), {**TWO, **DRAWS}),
    Use("ncp.errors", lambda **given: ncp().errors(**given), ERRORS),
    Use("ncp.errors, SDXL", of_xl, {"added_cond_kwargs": Argument(ADDED)}),
    Use(
        "ncp.errors, SDXL: conditioning",
        of_xl,
        {
            "text_embeds": Argument(ADDED["text_embeds"], ROWS, "added_cond_kwargs"),
            "time_ids": Argument(
                ADDED["time_ids"],
                ROWS | {"of int64", "of uint8", "with a rank more"},
                "added_cond_kwargs",
                {"of uint8": ADDED["time_ids"].byte().float()},
            ),
        },
    ),
    Use(
        "ncp.features",
        lambda **given: ncp().features(**given),
        {
            "latents": Argument(ARGUMENTS["noisy_latents"], ROWS, "latents|noisy_latents|timesteps"),
            "timesteps": Argument(ARGUMENTS["timesteps"], TIMES | {"0-dim", "without rows", "of two", "halves"}),
            "encoder_hidden_states": TWO["encoder_hidden_states"],
        },
    ),
    Use(
        "ncp_dpo_loss",
        ncp_loss.ncp_dpo_loss,
        {
            **PAIRS,
            "beta": BETA_OF_TWO,
            "label_smoothing": DPO["label_smoothing"],
            "sft_weight": WEIGHT,
            "loss_type": Argument("sigmoid"),
            "ref_pred": Argument(PAIR["ref_pred"], ROWS),
        },
    ),
    Use(
        "ncp_dpo_loss, kappa",
        ncp_loss.ncp_dpo_loss,
        {**PAIRS, "ref_pred": Argument(PAIR["ref_pred"], ROWS), "kappa": Argument(2.0, NUMBER | {"None"})},
        ["kappa"],
    ),
    Use(
        "ncp_dpo_loss, error of the reference",
        ncp_loss.ncp_dpo_loss,
        {**PAIRS, "ref_error": Argument(torch.ones(4), ROWS)},
        ["ref_error", "ncp"],
    ),
    Use("ncp_cpo_loss", ncp_loss.ncp_cpo_loss, {**PAIRS, "beta": BETA_OF_TWO, "sft_weight": WEIGHT}),
    Use("ncp_sft_loss", ncp_loss.ncp_sft_loss, PAIRS),
    Use("frozen_view", ncp_loss.frozen_view, {"model": Argument(unet(), {"model"})}),
]

AS_LISTS = {"NumPy array of it", "list of its values"}
BETAS = torch.linspace(0.1, 0.2, 60, dtype=torch.float64)
MOMENTS = {"of NaN", "of inf"}


def of_parts(**parts: Any) -> NoiseSchedule:
    """The schedule of a scheduler that is no more than what is read of one."""
    config = {"prediction_type": "epsilon", "num_train_timesteps": 60} | {
        k: parts.pop(k) for k in ("shift", "prediction_type", "num_train_timesteps") if k in parts
    }
    return NoiseSchedule.from_scheduler(types.SimpleNamespace(config=types.SimpleNamespace(**config), **parts))


for id, make, t in (
    ("NoiseSchedule", lambda: NoiseSchedule(BETAS), torch.tensor([10, 50])),
    ("FlowSchedule", lambda: FlowSchedule(3.0, 60), torch.tensor([10.0, 50.0])),
):
    between = {"of two"} if id == "FlowSchedule" else set()
    of_rows = (
        TIMES
        | between
        | {"list", "empty list", "no rows", "one row fewer", "one row more", "NumPy array", "on meta", *AS_LISTS}
    )
    anywhere = of_rows | SHAPES | {"zero", "whole", "NumPy int", "0-dim meta"}
    anywhere |= {"fraction", "NumPy float", "0-dim", "halves"} if between else set()
    USES += [
        Use(f"{id}().{method}", lambda make=make, method=method, **given: getattr(make(), method)(**given), arguments)
        for method, arguments in {
            "alpha": {"timesteps": Argument(t, anywhere)},
            "sigma": {"timesteps": Argument(t, anywhere)},
            "reverse_step": {
                "timesteps": Argument(t, of_rows),
                "step": Argument(1, WHOLE),
                "dtype": Argument(torch.float32),
                "generator": Argument(None, GENERATOR),
                "pairs": Argument(False, FLAG),
            },
        }.items()
    ]
USES += [
    Use(
        "NoiseSchedule",
        NoiseSchedule,
        {
            "betas": Argument(
                BETAS,
                DENSE | AS_LISTS | {"one row fewer", "one row more", "halves"},
                "betas|prediction_type",
                dict.fromkeys(AS_LISTS, BETAS),
            ),
            "prediction_type": Argument("epsilon"),
        },
    ),
    Use(
        "FlowSchedule",
        FlowSchedule,
        {
            "shift": Argument(3.0, NUMBER),
            "steps": Argument(60, {"whole", "NumPy int", "without rows"}),
            "prediction_type": Argument("flow"),
        },
    ),
    Use(
        "NoiseSchedule.from_scheduler",
        NoiseSchedule.from_scheduler,
        {"scheduler": Argument(diffusers.DDPMScheduler(), {"None"})},
    ),
    Use(
        "NoiseSchedule.from_scheduler: what it has",
        of_parts,
        {
            "betas": Argument(BETAS, DENSE | {"halves", "below all", "of inf"}, "betas|schedule"),
            "alphas_cumprod": Argument(
                (1 - BETAS).cumprod(0), DENSE | {"None", "on meta", "0-dim meta"}, "schedule|betas"
            ),
            "prediction_type": Argument("epsilon", {"None"}),
        },
    ),
    Use(
        "NoiseSchedule.from_scheduler: what a flow has",
        of_parts,
        {
            "shift": Argument(3.0, NUMBER, "shift|schedule"),
            "num_train_timesteps": Argument(60, {"whole", "NumPy int", "without rows"}, "steps|schedule"),
            "prediction_type": Argument("flow", {"None"}),
        },
    ),
]


def a_row(**columns: Any) -> list[Any]:
    return ncp_loss.absolute_winners([columns])


KEYS = ANY_NUMBER - {"0-dim", "without rows"} | {"True", "no text", "digits", "bytes", "inf", "-inf", "huge", "typo"}
ROW = {"caption": "a", "image_0_uid": "b", "image_1_uid": "c"}
USES += [
    Use(
        "absolute_winners",
        ncp_loss.absolute_winners,
        {
            "rows": Argument(
                [{**ROW, "label_0": 1, "label_1": 0}], {"no text", "empty list", "no rows"}, r"rows(\[0\])?"
            )
        },
    ),
    Use(
        "absolute_winners: columns",
        a_row,
        {
            **{name: Argument(value, KEYS, r"rows\[0\]") for name, value in ROW.items()},
            "label_0": Argument(1, {"True", "digits", "bytes", "NumPy bool", "without rows"}, r"rows\[0\]"),
            "label_1": Argument(0, {"zero"}, r"rows\[0\]"),
        },
    ),
]
# By argument, so that what one is told in different functions stands together.
CELLS = sorted(((name, use) for use in USES for name in use.tried or use.arguments), key=lambda cell: cell[0])


@pytest.mark.parametrize(("name", "use"), CELLS, ids=[f"{name} of {use.id}" for name, use in CELLS])
def test_whatever_an_argument_is_given_it_is_right_or_refused_by_name(name: str, use: Use) -> None:
    good = {key: argument.good for key, argument in use.arguments.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = {kind: complaint(use.call, good, name, use.arguments[name], kind) for kind in WRONG}
    assert not {kind: what for kind, what in told.items() if what}


# What only the other argument can tell to be wrong may go well with it where both are.
ALONE = sorted(WRONG.keys() - SHAPES - {"of two", "on meta", "0-dim meta"})


@settings(max_examples=600)
@given(
    use=st.sampled_from([use for use in USES if len(use.arguments) > 1]),
    kinds=st.tuples(*[st.sampled_from(ALONE)] * 2),
    data=st.data(),
)
def test_of_two_wrong_arguments_one_is_told(use: Use, kinds: tuple[str, str], data: st.DataObject) -> None:
    names = data.draw(st.permutations(list(use.arguments)))[:2]
    arguments = [use.arguments[name] for name in names]
    assume(all(kind not in a.right and exists(kind, a.good) for kind, a in zip(kinds, arguments, strict=True)))
    given = {name: argument.good for name, argument in use.arguments.items()}
    given |= {name: WRONG[kind](given[name]) for name, kind in zip(names, kinds, strict=True)}
    with pytest.raises((ValueError, TypeError)) as raised:
        use.call(**given)
    assert any(is_told(raised.value, argument.named or name) for name, argument in zip(names, arguments, strict=True))
