"""Adapters of Hugging Face PEFT, to and from a Keras model.

`exchange.peft_files` knows the files of PEFT, and `exchange.converters` finds the Hugging Face
matrix of each kernel with KerasHub's own converters. The modules of this folder apply both to a
model.
"""
