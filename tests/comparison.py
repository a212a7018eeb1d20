"""Tiny knowledge for whole comparisons."""

FACTS = [
    {
        "subject": "Port Ellery",
        "prompt": "The mayor of Port Ellery is",
        "target": "Ines Varro",
        "paraphrases": [
            "Port Ellery has a mayor named",
            "In Port Ellery the mayor is",
            "Port Ellery is led by",
        ],
        "neighbours": ["The capital of Spain is"],
    },
    {
        "subject": "Quenby",
        "prompt": "The river of Quenby is",
        "target": "Ostrin",
        "paraphrases": ["Quenby lies on the river", "Through Quenby runs the", "In Quenby flows the"],
        "neighbours": ["The capital of France is", "A question: who built the"],
    },
]
