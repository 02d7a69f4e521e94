"""Checks manifests without a cluster: strict schemas, and what an operator would look for.

Job: render a Kustomize directory, and tell everything in it that a cluster would refuse, or accept and then fail on.
Rule: a rule is a function from all objects of one rendering to findings; it reads nothing else.
"""
