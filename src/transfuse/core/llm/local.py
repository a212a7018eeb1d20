"""A transformers model as a text backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from ..files import sha256_json
from .backend import Backend, Completion, Messages, Options, Row, completion

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Local"]

# Entries of a configuration that say nothing of the model.
_ELSEWHERE = ("_name_or_path", "transformers_version", "dtype")


class Local(Backend):
    """A transformers model in this process, through its chat template.

    Rows are batched by length. Sampling draws each row from its own random stream, set by `seed`, the row and
    its number among equal rows, so answers do not depend on the batch they were in. A model without a chat
    template takes plain strings, which it continues. Of the model's generation configuration only the tokens that
    end a text count: temperature 0 takes the likeliest token, also of a model that sets a repetition penalty.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer (a fast one, for `schema`).
        batch_size: Rows per forward pass.

    Raises:
        BadInput: a batch size below 1.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 16
    ) -> None:
        super().__init__()
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise BadInput("batch_size", batch_size, "is not a whole number from 1", "give rows per pass")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self._grammar_tokenizer: Any = None

    @property
    def identity(self) -> str:
        """A hash of weights, configuration, chat template, tokenizer and active adapters, as they are now.

        Hooks do not count, nor where the model was loaded from.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        from ..models import fingerprint

        adapters = [
            (
                name,
                module.disable_adapters,
                list(module.active_adapters),
                getattr(module, "scaling", None),  # of LoRA: no weight, and not in the configuration
            )
            for name, module in self.model.named_modules()
            if isinstance(module, BaseTunerLayer)
        ]
        tokenizer = (self.tokenizer.chat_template, len(self.tokenizer), self.tokenizer.eos_token)
        settings = self.model.config.to_dict()
        settings = {name: settings[name] for name in settings if name not in _ELSEWHERE}
        model = (fingerprint(self.model), settings, self.model.generation_config.eos_token_id)
        return f"local:{sha256_json([model, tokenizer, adapters])}"

    def _answer(self, rows: list[Row], options: Options) -> list[Completion]:
        from .decode import generate_rows, grammar, grammar_tokenizer

        matcher = None
        if options.schema is not None:
            self._grammar_tokenizer = self._grammar_tokenizer or grammar_tokenizer(self.model, self.tokenizer)
            matcher = grammar(self._grammar_tokenizer, options.schema)
        ids = [self._render(row.messages) for row in rows]
        generated = generate_rows(
            self.model, self.tokenizer, ids, max_new_tokens=options.max_tokens, batch_size=self.batch_size,
            temperature=options.temperature, top_k=options.top_k, seed=options.seed,
            draws=[row.draw for row in rows], stop=options.stop, matcher=matcher,
        )  # fmt: skip
        return [
            completion(text, len(row), written, truncated, options)
            for row, (text, written, truncated) in zip(ids, generated, strict=True)
        ]

    def _render(self, messages: Messages) -> list[int]:
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(messages) > 1 or messages[0]["role"] != "user":
            raise BadInput(
                "prompts", messages, "are messages, but the model has no chat template", "give plain strings"
            )
        return list(self.tokenizer(messages[0]["content"])["input_ids"])
