"""The synthetic corpus: clips whose questions only a model that looks where it was told can answer.

`draw` paints scenes and encodes clips, `combinations` deals what stands where and keeps the held-out split, `questions`
holds every word of the corpus, `families` composes clips with their questions, `corpus` writes folders of them.
"""
