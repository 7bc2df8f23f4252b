"""The masks of ImageNet-R and -A, against what protocols appendix D says of them and against ids that are known."""

from __future__ import annotations

import hashlib

from lorasc_ds.tasks.class_masks import IMAGENET_A, IMAGENET_R, WORDNET_IDS


def test_sizes_sums_and_overlap() -> None:
    assert (len(IMAGENET_A), len(IMAGENET_R)) == (200, 200)
    assert (sum(IMAGENET_A), sum(IMAGENET_R)) == (102178, 86135)
    assert len({*IMAGENET_A} & {*IMAGENET_R}) == 86
    for mask in (IMAGENET_A, IMAGENET_R):  # a column of the masked logits is a folder in sorted order
        assert list(mask) == sorted({*mask})
        assert 0 <= mask[0] <= mask[-1] < 1000


def test_ids() -> None:
    assert len(WORDNET_IDS) == 1000
    assert list(WORDNET_IDS) == sorted({*WORDNET_IDS})
    assert WORDNET_IDS[0] == "n01440764"  # tench
    known = {1: "n01443537", 151: "n02085620", 281: "n02123045", 340: "n02391049"}  # goldfish, chihuahua, tabby, zebra
    known |= {817: "n04285008", 954: "n07753592", 963: "n07873807", 999: "n15075141"}
    assert {index: WORDNET_IDS[index] for index in known} == known
    joined = " ".join(WORDNET_IDS).encode()
    assert hashlib.sha256(joined).hexdigest() == "791ce0333040dd249d13133f90d28ef0263ffc01e5de0afd85b3e32048d7d456"


def test_the_masks_choose_the_folders_of_the_releases() -> None:
    """The first and last folders of the two public archives."""
    of_a, of_r = ([WORDNET_IDS[index] for index in mask] for mask in (IMAGENET_A, IMAGENET_R))
    assert (of_a[:3], of_a[-2:]) == (["n01498041", "n01531178", "n01534433"], ["n12144580", "n12267677"])
    assert (of_r[:3], of_r[-2:]) == (["n01443537", "n01484850", "n01494475"], ["n10565667", "n12267677"])
