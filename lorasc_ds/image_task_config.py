"""The settings of the tasks on images, by `task.name`. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lorasc_ds.section import PublicData, Section

Share = Annotated[float, Field(gt=0, le=1)]


class Classifying(Section):
    """What every task on the classes of images has."""

    class_names: str | None = Field(
        default=None,
        description="A text file with the name of every class, a line each, in the order of the classifier's outputs;"
        " null: ImageNet's from the extra [vision], or the names of the folders.",
    )
    templates: Literal["openai", "simple"] | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        default="openai",
        description="Prompts that a class's prototype is the mean of: the 80 of CLIP's authors, `a photo of a {}.`, or"
        " your own, in which {} is the class.",
    )
    head: Literal["auto", "prototypes", "text", "classifier"] = Field(
        default="auto",
        description="prototypes: means of the prompts' text features, made once; text: the same, made anew at every"
        " step, which trains a text tower; classifier: the model's own, random where it has none; auto: prototypes"
        " where the model has a text tower.",
    )
    train_head: bool = Field(
        default=False, description="Train prototypes or classifier too, outside the cascade; a random one has to be."
    )
    unreadable: Literal["skip", "refuse"] = Field(
        default="skip", description="An image that cannot be decoded is named, left out and counted, or ends the run."
    )


class TrainedClasses(Classifying):
    """What a task that is trained on has besides."""

    crop_scale: Annotated[tuple[Share, Share], Field(strict=False)] | None = Field(
        default=(0.9, 1.0),
        description="Share of its area that the random crop of a training image has, from and to; null: no crop.",
    )
    dev_examples: int | None = Field(
        default=None,
        ge=0,
        description="Training images held out for selection, where there is no dev folder; null: 10,000, but at most a"
        " tenth; 0: none, so that nothing can be selected.",
    )
    sample_seed: int = Field(default=0, ge=0, lt=2**32, description="Draws the images that are held out.")

    @model_validator(mode="after")
    def ordered(self) -> TrainedClasses:
        if self.crop_scale is not None and self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"task.crop_scale is {list(self.crop_scale)}: the smaller share has to come first")
        return self


class ImageNetConfig(PublicData, TrainedClasses):
    name: Literal["imagenet"] = Field(
        description="ImageNet-1K, top-1: folders `train` and `val` of a folder per WordNet id, or the hub's."
    )


class ImagesConfig(TrainedClasses):
    name: Literal["images"] = Field(description="Classes of your own images, top-1.")
    data_dir: str | None = Field(
        default=None,
        description="Folder with `train`, `test` and perhaps `dev` (or `val`), each with a folder per class.",
    )
    dataset: str | None = Field(default=None, description="Hub id of a data set with images, in place of data_dir.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of the hub data set.")
    image_column: str | None = Field(
        default=None, min_length=1, description="Its column of images; null: the only one that it has."
    )
    label_column: str = Field(default="label", min_length=1, description="Its column of classes.")
    train_split: str = Field(default="train", min_length=1, description="Its split that is trained on.")
    test_split: str = Field(default="test", min_length=1, description="Its split that is only reported.")

    @model_validator(mode="after")
    def one_source(self) -> ImagesConfig:
        if (self.data_dir is None) == (self.dataset is None):
            raise ValueError(
                f"task.data_dir is {self.data_dir!r} and task.dataset {self.dataset!r}: give one of them, a folder or a"
                " hub id"
            )
        return self


class DigitImagesConfig(Classifying):
    name: Literal["digit_images"] = Field(
        description="Handwritten digits as images, from one domain to another; nothing is downloaded."
    )
    domain: Literal["upright", "mirrored", "rotated", "blurred"] = Field(
        default="mirrored", description="The new domain; the model in the package knows upright digits."
    )
    train_examples: int = Field(default=100, ge=1, le=296, description="Training images in the new domain.")
    dev_examples: int = Field(default=100, ge=1, le=296, description="Images for selection; 297 are left for both.")
    test_examples: int = Field(default=500, ge=1, le=500, description="Test images, the same ones in every domain.")
    label_noise: float = Field(default=0.0, ge=0, le=1, description="Share of training images with a wrong label.")
    crop_scale: Annotated[tuple[Share, Share], Field(strict=False)] | None = Field(
        default=None, description="Share of its area that the random crop of a training image has; null: no crop."
    )

    @model_validator(mode="after")
    def enough_images(self) -> DigitImagesConfig:
        if self.train_examples + self.dev_examples > 297:
            raise ValueError(
                f"task.train_examples {self.train_examples} + task.dev_examples {self.dev_examples} is more than the"
                " 297 images that neither the base model nor the test has: lower one"
            )
        return self


class RobustnessConfig(PublicData, Classifying):
    name: Literal["imagenet_v2", "imagenet_c", "imagenet_r", "imagenet_a", "imagenet_sketch", "imagenet_stylized"] = (
        Field(description="ImageNet-V2, -C, -R, -A, -Sketch and Stylized-ImageNet, top-1 (launch/evaluate.py alone).")
    )


class CorruptedImagesConfig(Classifying):
    name: Literal["corrupted_images"] = Field(
        description="Your own images under corruptions, as launch/corrupt.py writes them: top-1 and its mean."
    )
    data_dir: str = Field(description="Folder of folders `corruption/severity/class`.")


class ImageTextConfig(Section):
    name: Literal["image_text"] = Field(
        description="Questions about images, or captions: an answer is generated, exact match."
    )
    train_file: str = Field(
        description="A .jsonl file; of a row `image` (a path from the file's folder, or a list), `question` (null for a"
        " caption) and `answer` (a text, or a list of right ones, of which the first is trained on)."
    )
    eval_file: str | None = Field(default=None, description="Held-out rows; null: dev_examples of the training rows.")
    test_file: str | None = Field(default=None, description="Rows that are only reported.")
    dev_examples: int | None = Field(
        default=None, ge=1, description="Rows held out for selection; null: 1000, but at most a tenth."
    )
    sample_seed: int = Field(default=0, ge=0, lt=2**32, description="Draws the rows that are held out.")
    template: str | None = Field(
        default=None,
        description="The prompt, with {image} and {question}; null: the processor's chat template, or"
        " `{image}\\n{question}\\n` where it has none.",
    )
    use_images: bool = Field(
        default=True, description="false: the same questions without their images, a baseline that has to guess."
    )
    max_new_tokens: int = Field(default=32, ge=1, description="Longest answer that is generated, in tokens.")
    unreadable: Literal["skip", "refuse"] = Field(
        default="skip", description="A row whose image cannot be decoded is named and left out, or ends the run."
    )
