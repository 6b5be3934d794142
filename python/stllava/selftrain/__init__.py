"""Self-training: the model asks, answers, a judge prefers, pairs come out.

    ask      image -> description -> questions         answer   question -> sampled answers
    judge    two answers, both orders -> scores        pairs    best against worst, balanced, drops counted
"""
