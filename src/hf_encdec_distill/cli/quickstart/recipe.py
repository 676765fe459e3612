"""Everything that decides how good the quickstart's student becomes, and for what its time is spent. All in one place:
the other files of this folder say how, this one says how much."""

ENCODER_LAYERS, DECODER_LAYERS = 5, 6
# Tokens of student and teacher: those most frequent in the training rows. The head reads a row of weights for each at
# every step of training and of generation.
VOCABULARY = 16_000
MAX_PROMPT, MAX_TARGET = 256, 32  # tokens
OTHER_TEMPLATE = "{source}\n\nAnswer:"  # for data that is not the built-in task

# Training
BATCH_SIZE = 8
TEACHER_LEARNING_RATE = 2e-4
TEACHER_PASSES = 3
STUDENT_LEARNING_RATE = 1e-3
# Of the student, where all weights are trained. To update them takes as long as several rows, and with smaller batches
# or the rate of the decoder alone a student ends farther from its teacher after the same time.
ALL_WEIGHTS_BATCH_SIZE, ALL_WEIGHTS_LEARNING_RATE = 16, 5e-4
WARMUP = 0.1  # of the steps that fit into the time; the rest falls linearly to zero
DIVERGENCE, DISTILL_WEIGHT = "forward_kl", 0.9
LAYER_SELECTION = "induction"
HEAL_ROWS = 100  # the layers are chosen and fitted on
# First the encoder stays as the fit left it. What it and the teacher say of some rows is recorded, and many cheap
# steps are made on these. A longer run then trains all weights, on rows that are mostly read once.
FROZEN_BELOW_MINUTES = 30
FROZEN_MINUTES = 10  # of a longer run, at most: fit, records and training on them
# New rows teach more than old ones, but cost more: where to record a row took as long as to train on it 3.4 times, the
# best of four shares left time for three passes.
RECORDING_SHARE = 0.55  # of the time for records and for training on them, at most
PASSES = 1.1  # over the recorded rows, at least: those that are never trained on are time wasted
TIMED_STEPS = 8  # of the student, by which that is planned
FIRST_RECORDED = 16  # rows on which those steps are made, and from whose cost the next ones are planned
TOP_K = 32  # tokens that are recorded of the teacher
VALIDATION_ROWS = 96  # at most, and as many as take `VALIDATION_SHARE` of the teacher's time
VALIDATION_SHARE = 0.1

# The time that evaluation and report leave, in parts; a student and its twin share one.
PARTS = {"teach": 16, "start": 2, "students": 56}
# Of that time, in a longer run, or as much as in one of `FROZEN_MINUTES` if that is more. A teacher that had learnt
# for twice as long made no better student within an hour.
LONG_TEACHER_SHARE = 0.05

# Evaluation: all its rows, of all models, before and after.
EVALUATION_SHARE = 0.12  # of the time
ENOUGH_ROWS = 64  # are measured even if they take up to `LARGEST_EVALUATION_SHARE` of it
LARGEST_EVALUATION_SHARE = 0.35
MOST_ROWS = 500
FIRST_ROWS = 8  # from whose cost the others are planned
SAMPLES = 10
LATENCY_SHARE = 0.03
LATENCY_ROUNDS, LATENCY_TOKENS = 8, 32  # rounds at most
REPORT_SECONDS = 8.0  # plots, card and samples

GO_ON_MINUTES = 60  # for a run that is continued, in the command that the verdict gives
