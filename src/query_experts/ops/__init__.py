"""The steps of the layer as functions: for each a plain implementation, and faster ones that are tested against it.

Which implementation runs is chosen here, at the top of each step's file, and nowhere else.
"""
