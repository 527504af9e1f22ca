"""What a run trains for: the objectives and their settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moetrain.config.section import Fraction, Section


class CausalLMConfig(Section):
    """Each token is predicted from those before it. For decoders."""

    type: Literal["causal_lm"] = "causal_lm"


class MaskedLMConfig(Section):
    """Some tokens are hidden, and predicted from all others (BERT, arXiv 1810.04805, section 3.1). For encoders.

    Which ones is a function of the seed and the sample's number, so a text that is read again is hidden differently,
    and no layout or restart changes a batch.
    """

    type: Literal["masked_lm"] = "masked_lm"
    share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.15, description="of the tokens of a sequence, to be predicted; special tokens never are"
    )
    mask_share: Fraction = Field(default=0.8, description="of the predicted tokens, replaced by the mask token")
    random_share: Fraction = Field(
        default=0.1, description="of the predicted tokens, replaced by a random token; the rest stay as they are"
    )

    @model_validator(mode="after")
    def _shares_leave_no_less_than_nothing(self) -> MaskedLMConfig:
        if self.mask_share + self.random_share > 1:
            raise ValueError(
                f"mask_share + random_share ({self.mask_share:g} + {self.random_share:g}) must not exceed 1: "
                "they are shares of the same tokens"
            )
        return self


class _SequenceTask(Section):
    """What all tasks on whole texts need: where a line of the data keeps its parts."""

    text: str = Field(default="text", description="key (.jsonl) or column (.tsv) of the text")
    text_pair: str | None = Field(default=None, description="key or column of a second text; absent: one text")
    label: str = Field(default="label", description="key or column of the label")


class ClassifyConfig(_SequenceTask):
    """A text, or a pair, belongs to one of some classes: cross-entropy over `model.head`'s outputs."""

    type: Literal["classify"] = "classify"
    classes: list[str] = Field(
        min_length=2, description="labels as they stand in the data, in the order of the outputs; F1 is of the second"
    )

    @model_validator(mode="after")
    def _classes_differ(self) -> ClassifyConfig:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes ({', '.join(self.classes)}) must all be different")
        return self

    @property
    def outputs(self) -> int:
        """Numbers that the head gives for a sequence."""
        return len(self.classes)


class RegressConfig(_SequenceTask):
    """A text, or a pair, has a score: mean squared error of `model.head`'s one output."""

    type: Literal["regress"] = "regress"

    @property
    def outputs(self) -> int:
        """Numbers that the head gives for a sequence."""
        return 1


ObjectiveConfig = Annotated[
    CausalLMConfig | MaskedLMConfig | ClassifyConfig | RegressConfig, Field(discriminator="type")
]
SequenceTaskConfig = ClassifyConfig | RegressConfig
