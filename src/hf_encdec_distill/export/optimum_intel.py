"""What Optimum's OpenVINO models say of our own exports. Imported by `registration`."""

from optimum.intel.openvino.modeling_seq2seq import OVModelForSeq2SeqLM

from .optimum_loading import refuse_our_graphs


refuse_our_graphs(OVModelForSeq2SeqLM)
