"""Typed results that are written and read as JSON.

`RunRecord` is the contract that the card and other tools read
(`checkpoint/abliterator/record.json`). A measurement that was not made is `None` (JSON `null`),
never 0. Rates and means are an `Estimate`: a value with its interval and n.

    record = RunRecord.model_validate_json(read_text(path))
    record.behaviour["target"].base.refusal.value
"""

from abliterator.record._comparison import (
    Asking,
    Comparison,
    Difference,
    Measurement,
    OwnScores,
    Part,
    TensorDelta,
    WeightDiff,
    WeightVerdict,
)
from abliterator.record._directions import DirectionChecks, ProtectedSet
from abliterator.record._groups import Group, GroupedMeasure, Grouping, GroupMeasure, Outlier
from abliterator.record._measured import (
    Behaviour,
    BehaviourSide,
    BenchmarkResult,
    Completion,
    Divergence,
    Estimate,
    FinishReason,
    Frozen,
    Grade,
    SampledAnswers,
    SampledCompletion,
    SampledVerdict,
    Side,
    TextStatistics,
    Verdict,
    VerdictKind,
)
from abliterator.record._run import (
    CalibrationSummary,
    EditSummary,
    EngineIdentity,
    JudgeIdentity,
    ModelIdentity,
    PromptOrigin,
    Provenance,
    QuantizedEdits,
    Quotation,
    RunRecord,
    TensorEdit,
    Tool,
)
from abliterator.record._selection import (
    AnswerSummary,
    Candidate,
    Rung,
    Selection,
    SelectionBase,
    Stack,
    Structure,
)
from abliterator.record._side_effects import ConfidenceFigure, PairedFigure, SideEffect
from abliterator.record._study import Agreement, ContrastDifference, Study, StudyRow
from abliterator.record._survival import Survival, SurvivingStrength
from abliterator.record._tuning import Trial, Tuning
from abliterator.record._verification import AdapterVerification, EffectiveStrength, Verification

__all__ = [
    "AdapterVerification",
    "Agreement",
    "AnswerSummary",
    "Asking",
    "Behaviour",
    "BehaviourSide",
    "BenchmarkResult",
    "CalibrationSummary",
    "Candidate",
    "Comparison",
    "Completion",
    "ConfidenceFigure",
    "ContrastDifference",
    "Difference",
    "DirectionChecks",
    "Divergence",
    "EditSummary",
    "EffectiveStrength",
    "EngineIdentity",
    "Estimate",
    "FinishReason",
    "Frozen",
    "Grade",
    "Group",
    "GroupMeasure",
    "GroupedMeasure",
    "Grouping",
    "JudgeIdentity",
    "Measurement",
    "ModelIdentity",
    "Outlier",
    "OwnScores",
    "PairedFigure",
    "Part",
    "PromptOrigin",
    "ProtectedSet",
    "Provenance",
    "QuantizedEdits",
    "Quotation",
    "RunRecord",
    "Rung",
    "SampledAnswers",
    "SampledCompletion",
    "SampledVerdict",
    "Selection",
    "SelectionBase",
    "Side",
    "SideEffect",
    "Stack",
    "Structure",
    "Study",
    "StudyRow",
    "Survival",
    "SurvivingStrength",
    "TensorDelta",
    "TensorEdit",
    "TextStatistics",
    "Tool",
    "Trial",
    "Tuning",
    "Verdict",
    "VerdictKind",
    "Verification",
    "WeightDiff",
    "WeightVerdict",
]
