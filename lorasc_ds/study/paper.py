"""The tables of the paper (LoRASC, arXiv 2407.01491), as printed; quoted beside our own, never mixed with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorasc_ds.study.plan import Row


@dataclass(frozen=True, slots=True)
class Quoted:
    """A table of the paper: what it is of, and row -> column -> value."""

    title: str
    rows: dict[str, dict[str, str]]
    note: str = ""

    def of(self, row: Row) -> Mapping[str, str]:
        """Column -> value of a row of ours, by its label or, in a study of one adapter, with that before it."""
        return self.rows.get(row.label) or self.rows.get(f"{row.adapter} {row.label}", {})


def read(text: str) -> dict[str, dict[str, str]]:
    """Lines of a row's name, `|` and its values; the first line has the names of the columns."""
    head, *lines = (line.split("|") for line in text.strip().splitlines())
    columns = head[1].split()
    return {name.strip(): dict(zip(columns, values.split(), strict=True)) for name, values in lines}


TABLES = {
    "table1": Quoted(
        "Table 1, Llama-2-7B",
        read("""
            | sst2 rte  cb   boolq wsc  wic  multirc copa record squad drop gsm8k
LoRA                    | 95.5 87.4 91.1 85.7 70.2 72.4 85.3 85.0 81.2 90.4 51.6 19.5
LoRA w/ COLA            | 95.9 87.7 91.1 85.7 66.4 72.6 85.3 82.0 81.4 90.6 51.6 21.0
LoRA + Cascade          | 95.8 87.7 92.9 86.1 71.1 72.3 86.3 88.0 81.6 91.8 52.5 21.5
LoRA ++ Slow LoRA       | 96.0 88.0 96.4 86.8 74.0 72.1 86.3 88.0 82.1 92.7 55.3 27.5
LoRA +++ Noise Tuning   | 96.1 88.1 96.5 87.4 75.0 72.7 86.6 88.0 82.2 92.9 56.7 27.5
LoRA+                   | 95.7 87.0 91.4 85.9 69.2 72.1 85.7 87.0 81.3 90.5 55.8 22.0
LoRA+ + Cascade         | 95.7 87.0 92.9 86.2 71.2 72.8 85.3 88.0 81.9 91.2 55.8 19.5
LoRA+ ++ Slow LoRA      | 95.7 88.1 92.9 85.9 67.3 73.5 85.7 88.0 81.9 92.0 56.3 23.0
LoRA+ +++ Noise Tuning  | 95.8 88.1 92.9 86.3 71.4 74.1 86.1 88.0 81.9 92.0 56.4 24.0
DoRA                    | 95.4 87.4 96.4 85.7 72.1 71.5 84.7 88.0 81.1 91.1 54.8 21.0
DoRA + Cascade          | 95.8 87.4 96.4 85.8 65.4 72.8 84.1 88.0 81.6 91.7 52.6 22.5
DoRA ++ Slow LoRA       | 95.8 88.1 96.4 85.8 65.4 72.8 86.1 88.0 81.9 92.8 54.8 25.0
DoRA +++ Noise Tuning   | 96.0 88.5 96.5 87.6 75.6 72.8 86.8 89.0 82.2 93.3 56.5 25.5
"""),
    ),
    "table2": Quoted(
        "Table 2, Llama-2-7B on Alpaca",
        read("""
                 | MMLU  DROP  HEval BBH   GSM8K
LoRA             | 45.83 32.76 31.26 13.41 11.5
+ Cascade        | 45.53 32.71 31.61 14.02 11.5
++ Slow LoRA     | 45.68 33.74 31.38 17.07 12.5
+++ Noise Tuning | 45.98 33.02 31.61 15.24 16.5
"""),
        "as printed: the heads HEval and BBH look exchanged (what stands under BBH is a number of 164 problems)",
    ),
    "table3": Quoted(
        "Table 3, CLIP ViT-bigG/14",
        read("""
                 | ImageNet IN-V2 IN-C IN-R IN-A IN-SK IN-ST
LoRA             | 87.1 77.7 66.2 87.1 72.6 64.9 24.1
+ Cascade        | 87.1 77.5 66.7 88.5 73.6 65.4 24.3
++ Slow LoRA     | 87.7 78.3 66.8 88.1 73.4 65.2 24.1
+++ Noise Tuning | 87.8 78.4 66.8 88.7 73.4 65.5 24.4
"""),
    ),
    "table4": Quoted(
        "Table 4, Llama-2-7B",
        read("""
                                | rte  drop wic  boolq record sst2 squad
+++ Noise Tuning, experts 2     | 87.0 53.8 72.4 85.3 81.3 95.5 92.0
+++ Noise Tuning, experts 5     | 88.1 56.7 72.6 87.4 82.2 96.1 92.9
+++ Noise Tuning, experts 25    | 86.7 51.2 70.5 83.5 81.4 95.5 92.2
+++ Noise Tuning, experts 125   | 83.8 50.2 70.5 84.5 81.2 95.1 90.7
+++ Noise Tuning, experts 1250  | 83.8 49.4 69.4 85.3 81.1 92.9 88.1
"""),
    ),
}
