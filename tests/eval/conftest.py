"""The models of these tests."""

from evaluated import classifier as classifier
from evaluated import decoder as decoder
from evaluated import encoder as encoder
from evaluated import encoder_decoder as encoder_decoder
from evaluated import on_mesh as on_mesh
