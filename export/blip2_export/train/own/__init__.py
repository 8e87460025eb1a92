"""The two stages and questions on people's own pictures, around the frozen models of any BLIP-2 that can be converted.

`options` says what is meant, `records` reads what the data says, `split` keeps a share of it apart, `order` decides which record a
step sees, `pictures` makes pixels of them. `base` opens the models, `start` gives the Q-Former its first weights, `stage1`,
`stage2` and `questions` are what is trained, `estimate` says what it will take, `loop` trains it, `progress` says how it goes,
`folders` writes what `transformers` and the exporter read, `chain` makes a bundle of it. `stages` is where the rest meets.
"""
