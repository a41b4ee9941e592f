"""Test the weights that trainings start from."""
import pytest
from google.protobuf import text_format

from ddinit.prototxt import caffe_messages
from training.starts import check_filled

NET = """
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "two" type: "InnerProduct" bottom: "conv" top: "two"
  inner_product_param { num_output: 4 } }
"""


def test_layers_that_nothing_fills_are_told_before_training():
    definition = text_format.Parse(NET, caffe_messages().NetParameter())
    check_filled(definition, ["conv", "relu"])
    with pytest.raises(ValueError, match="layer 'two': neither the weights nor a weight_filler"):
        check_filled(definition, ["conv", "two"])
