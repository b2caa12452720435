"""The stages of a build, one file each, named after the stage.

A file imports only those of stages that run before its own.
"""
