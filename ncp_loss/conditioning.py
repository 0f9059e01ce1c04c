"""conditioning: what the encoder's model is given besides latents and timesteps, checked and in the model's dtype."""

from __future__ import annotations

import copy
import inspect
from collections import UserDict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .checks import bad, check_floating, check_numbers, check_rows

# How the names of what holds numbers end, but for an s. Half precision would round them.
_NUMBERS = ("size", "coord", "resolution", "position", "index", "indice")


class Conditioning:
    """Checks what the model is given, before the model would fail on it.

    With a `call` of the user's (not ``by_name``) only the user knows what the model takes.
    """

    def __init__(self, model: nn.Module, by_name: bool) -> None:
        self._model, self._by_name = model, by_name
        self._signature = inspect.signature(type(model).forward)
        self._takes_text = "encoder_hidden_states" in self._signature.parameters and by_name
        self._reads_text = any(getattr(module, "has_cross_attention", False) for module in model.modules())

    def __call__(self, latents: Tensor, text: Tensor | None, model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The model's keyword arguments, checked."""
        texts = {"encoder_hidden_states": text} if text is not None or self._takes_text else {}
        conditioning = {**model_kwargs, **texts}
        if self._by_name:
            self._check_values(latents, text, model_kwargs)
            if not torch.compiler.is_compiling():
                self._check_names(conditioning)
        return conditioning

    def _check_names(self, conditioning: Mapping[str, Any]) -> None:
        try:
            self._signature.bind(self._model, None, timestep=None, **conditioning)
        except TypeError as error:
            model, takes = f"{type(self._model).__name__}.forward", self._signature.parameters.keys()
            unknown = conditioning.keys() - takes - {"encoder_hidden_states"}
            if unknown and "timestep" in takes:  # a misspelled argument of the loss ends up here too
                raise bad(min(unknown), f"an argument of the loss or of {model}", "neither", TypeError) from None
            names = ", ".join(["timestep", *conditioning])
            must_be = "given, a function that calls the model as its trainer does (docs, recipes/own-models)"
            was = f"None, and {model}, called with latents, {names}: {error}"
            raise bad("call", must_be, was, TypeError) from None

    def _check_values(self, latents: Tensor, text: Tensor | None, model_kwargs: Mapping[str, Any]) -> None:
        config: Any = getattr(self._model, "config", None)
        if text is not None:
            # The width is known where the text goes straight into cross-attention, with no projection before it.
            width = getattr(config, "cross_attention_dim", None)
            known = self._reads_text and isinstance(width, int) and getattr(config, "encoder_hid_dim", None) is None
            check_floating("encoder_hidden_states", text)
            check_rows("encoder_hidden_states", text, latents, *(("L", width) if known else ()))
        elif self._reads_text and not _self_sufficient(config):
            raise bad("encoder_hidden_states", "given: the model attends to text", "None")
        if getattr(config, "addition_embed_type", None) == "text_time":
            added = model_kwargs.get("added_cond_kwargs")
            if not isinstance(added, Mapping) or not {"text_embeds", "time_ids"} <= set(added):
                was = sorted(map(str, added)) if isinstance(added, Mapping) else type(added).__name__
                raise bad("added_cond_kwargs", "a dict with text_embeds and time_ids, as for SDXL", was)
            names = {key: f"added_cond_kwargs[{key!r}]" for key in ("time_ids", "text_embeds")}
            ids = check_rows(names["time_ids"], check_numbers(names["time_ids"], added["time_ids"]), latents)
            # SDXL projects the pooled text together with embeddings of the time ids, whose width is known.
            width = config.projection_class_embeddings_input_dim - config.addition_time_embed_dim * ids[0].numel()
            text_embeds = check_floating(names["text_embeds"], added["text_embeds"])
            check_rows(names["text_embeds"], text_embeds, latents, width)


def _self_sufficient(config: Any) -> bool:
    """Whether a U-Net's cross-attention needs no text: it attends to images (Kandinsky 2.2) or to itself (AudioLDM)."""
    widths, channels = getattr(config, "cross_attention_dim", None), getattr(config, "block_out_channels", None)
    images = getattr(config, "encoder_hid_dim_type", None) == "image_proj"
    return images or (isinstance(widths, list | tuple) and list(widths) == list(channels or ()))


def prepared(value: Any, dtype: torch.dtype | None, trainer_dtype: torch.dtype, batch: int, name: str) -> Any:
    """Conditioning as the encoder takes it: detached, with floats in ``dtype``, in new containers.

    The text follows the model's dtype, and so does what has the latents' dtype or is no wider than the model's. Class
    labels or rotary tables that the trainer keeps wider stay as they are. Ids, sizes, and a number for each sample or
    for all, such as a second time, are never narrowed, since bf16 cannot hold a number such as 1021.
    """
    again = partial(prepared, dtype=dtype, trainer_dtype=trainer_dtype, batch=batch)
    if isinstance(value, dict | UserDict):
        new = copy.copy(value)  # of its own class, which may have attributes; some have no `update`
        for key, item in value.items():
            new[key] = again(item, name=str(key))
        return new
    if isinstance(value, Mapping):
        return {key: again(item, name=str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [again(item, name=name) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if dtype is not None and value.is_floating_point() and not name.endswith("ids"):
        one_a_sample = value.ndim == 0 or len(value) == value.numel() == batch
        number = name.rstrip("s").endswith(_NUMBERS) or one_a_sample
        wide = value.dtype == trainer_dtype and not number
        follows = name == "encoder_hidden_states" or wide or value.itemsize <= dtype.itemsize
        value = value.to(dtype) if follows else value
    return value


def fresh_containers(_: nn.Module, args: Any, kwargs: Any) -> Any:
    """New lists and dicts at each point, since a model may empty the one that it gets, as diffusers' U-Net does."""
    return tree_map(lambda x: x, (args, kwargs))
