"""What an edited tensor still writes into the subspace, measured again from its stored bytes."""

import pytest

from abliterator.checkpoint import Checkpoint
from abliterator.verification._leak import LeakMeter
from tests.bake import test_mxfp4

mxfp4_folder = test_mxfp4.mxfp4_folder


def test_the_meter_of_verify_reads_blocks_of_mxfp4_too(mxfp4_folder, tmp_path):
    edits = test_mxfp4.baked(mxfp4_folder, tmp_path)
    base, edited = Checkpoint.open(mxfp4_folder), Checkpoint.open(tmp_path)
    meter = LeakMeter(base, test_mxfp4.basis())
    for edit in edits:
        stored = (bytearray(checkpoint.read(edit.name)) for checkpoint in (base, edited))
        assert meter.leak(base.tensors[edit.name], *stored) == pytest.approx(edit.leak, rel=0.01)
