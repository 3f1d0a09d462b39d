"""Whether a challenger may take the champion's place: a decision from two evaluations, as a value.

Nothing here knows where models are registered, and nothing here moves anything.
"""
