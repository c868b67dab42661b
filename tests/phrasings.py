"""Phrasings of answers to multiple-choice questions, and what each deserves: by options and letter (None: refused)."""

COLOURS = ["red", "blue", "dark red", "green"]
FOUR = ["red", "green", "blue", "yellow"]
YES_NO, TRUE_FALSE = ["Yes", "No"], ["True", "False"]
DIGITS, WORDS, GROUPED = ["1", "2", "3", "4"], ["two", "three", "four", "five"], ["1,000", "2,500", "10", "0.5"]
FRACTIONS, PLACES = ["1/2", "1/3", "1/4", "3/4"], ["left", "right", "above", "below"]
WHICH = ["The left image", "The right image", "Both images", "Neither image"]

PHRASINGS = [
    (FOUR, "C", [
        "C) blue", "A. red B. green C. blue D. yellow. C", "A. red B. green C. blue D. yellow Answer: C. blue",
    ]),
    (COLOURS, None, [
        "C) blue", "All but C are wrong.", "Everything except C is wrong", "Between A and C", "Either A or C",
        "A and/or C", "A & C", "A + C", "AC", "A, C and D", "All of them", "Both A and C", "A as well as C",
        "A or maybe C", "Maybe A, maybe C", "not C", "Anything but C", "C is not the answer", "C isn't it",
        "C: wrong", "C - incorrect", "C (wrong)", "C ✗", "The answer is none of A, B, C, D", "Not sure: A or B",
        "A car.", "I see a B on the car.", "Plan B", "C-3PO", "C++", "c'est rouge", "The car isn't blue",
        "No car is blue", "hardly blue, green", "It looks red at first but is in fact green.",
        "The red car is in Image1; the car in Image2 is green.", "It could be red or blue.", "blue-ish", "bluish",
        "not A; not B; not D", "I don't know", "It's hard to say.", "There is a red car and a blue car.",
        "The image shows a car", "Cannot be determined: A or C", "A/C", "C and D both fit",
        "Option A is red, option B is blue.", "The sign says A.", "The car has a letter B on it", "grade B",
        "Image B", "type C battery", "I", "A big car", "A car is parked.", "A cat and a dog", "A and a half",
        "Be careful.", "See image.", "Could you repeat the question?", "Dark", "Image1 is red, Image2 is blue.",
        "It was red, now it is blue.", "red → blue", "red=blue", "(A), (B)", "[A]/[B]",
    ]),
    (COLOURS, "C", [
        "it's C.", "It's C!", "A? No, C.", "not A but C", "Not A, but C.", "neither A nor B; C",
        "Neither A nor B. C.", "Neither A nor B, so C.", "**Answer: C**", "**C**: dark red", "- C", "* C", "1. C",
        "• C", "> C", "`C`", "```\nC\n```", "### Answer\nC", "Answer\n\nC", "Answer - C", "Answer → C", "=> C", "C।",
        "C؟", "C።", "答案：C", "答案是C", "答案是C。", "C．", "Ｃ）", "(C）", "「C」", "《C》", "“C”", "'C'", "‘C’",
        "\"C\"", "<C>", "{C}", "$C$", "$\\boxed{C}$", "\\(C\\)", "\\textbf{C}", "C\\n", "Option (C)",
        "Option C: dark red", "option C is right", "Choice C", "Letter C", "I'd go with option C.",
        "My answer would be C.", "My final answer is C", "So the answer is C.", "Hence, C.",
        "Thus, the answer is (C).", "The answer should be C.", "The right answer: C", "I'm going with C",
        "C is the answer.", "C is the best choice.", "C seems right.", "C would be correct.", "C, definitely.",
        "Definitely C", "C for sure", "Clearly C.", "C obviously", "C, I think.", "C I think", "C... I guess", "C…",
        "Hmm, C.", "Well, C", "Sure! C", "Okay: C", "Based on the picture, C.",
        "Based on the image, the answer is C.", "In Image2 the car is dark red, so C.",
        "The car is dark red, so the answer is C.", "The car is dark red (C).", "The car is dark red. (C)",
        "The car is dark red: C", "The car is dark red - C", "dark red — C", "dark red, C", "A is red's letter but C",
        "Not A, not B, but C.", "Not A. Not B. C.", "A and B are wrong; C is right", "A, B and D are wrong, so C.",
        "It can't be A or B, so it must be C.", "A is out, so C.", "Ruling out A and B, C remains.",
        "Only C is correct.", "Only C.", "Just C", "C only", "C alone", "C (not A)", "C (dark red), not A (red)",
        "C [dark red]", "C/dark red", "C | dark red", "C = dark red", "C → dark red", "C\tdark red", "C dark red",
        "C dark-red", "C.dark red", "C.) dark red", "(C) Dark Red.", "C).", "c", "c.", "c)", "c: dark red",
        "answer is c", "it is c", "the answer is (c)", "is it C?", "C? Yes.", "C, yes", "Yes, C.", "No, C.",
        "C, not D.", "C but not D", "C as opposed to A", "C over A", "C and not A", "C without doubt",
        "C as the car is dark red", "C; the car is dark red, not red.", "C – the car isn't red",
        "C: it isn't red, it is dark red", "C. Not A, because the red car is in Image1.",
        "The answer isn't A, it's C.", "The answer is not A; it is C", "At first A, but actually C",
        "I thought A, but it is C.", "Wait, not A. The answer is C.", "A, no wait, C", "A. Wait, no: C.",
        "A... no, C", "A or C? C.", "Either A or C, but I choose C.", "Between A and C, I pick C.", "C ✓", "✅ C",
        "{'answer': 'C'}", "answer: \"C\"", "<b>C</b>", "The answer is:\n\nC", "The answer is:\n\n(C) dark red",
        "Final Answer: (C) dark red", "Correct: C", "C (Correct)",
        "Let me see. The car is dark red. Therefore, option C.",
        "Step 1: A is red. Step 2: the car is dark red. Answer: C",
        "A: red - no. B: blue - no. C: dark red - yes. D: green - no.", "A - no\nB - no\nC - yes\nD - no",
        "A: no, B: no, C: yes", "A. red (wrong)\nB. blue (wrong)\nC. dark red (correct)", "C: the others are wrong",
        "C. All the others are wrong.", "C, the others can be ruled out", "C. None of the others fit.",
        "C, no question", "C. No doubt.", "C, never A", "Certainly not A. C.", "Definitely not A, definitely C.",
        "It's definitely not A; C it is.", "I'd rule out A and B and choose C.", "I rule out A, B and D. C.",
        "I exclude A. I choose C.", "A would be wrong here, so I'd say C.", "The answer isn't A or B. It's C.",
        "The answer is neither A nor B but C.", "If it were red I would say A, but it is dark red, so C",
        "C. Why not A? Because A is in Image1.", "C – not A!", "C; not D; not A.", "C (I am not sure)",
        "C, but I'm not sure", "C, though I can't be certain.", "C. I'm not certain.", "C?", "Could be C",
        "Possibly C.", "I believe that the answer is C.", "I believe C is correct", "I am confident it's C",
        "The letter is C", "You should choose C.", "The best option would be C", "Réponse : C", "La respuesta es C.",
        "Die Antwort ist C.", "Ответ: C", "答えはCです", "正解はCです。", "정답: C", "选C", "选项C。", "不是A，是C。",
        "C，因为车是深红色的。", "(C) dark red。", "dark red, not just red",
    ]),
    (COLOURS, "A", [
        "A.", "A!", "A。", "A car that is red.", "The car, a red one, is not blue.", "Picture A shows a red car", "a",
        "a red", "A is for apple", "Do you mean red?", "RED!!!", "...red", "red?", "red\n", "\n\nred", "red, I think",
        "red - certainly not blue", "not dark red, just red", "just red, not dark red", "The answer: red.",
        "answer is: red, not blue", "red (A)", "A (red), not B (blue)", "not B (blue) but A (red)",
        "A red car, not B.", "(A) and not (B)", "{A}",
    ]),
    (COLOURS, "D", [
        "A green one", "It's not red, not blue, but green.", "not red and not blue: green", "blue or green? green.",
        "D. It is green, A is red.", "D day", "isn't blue, is it? no, green",
    ]),
    (COLOURS, "B", [
        "Blue. Not red.", "Blue; certainly not red", "Blue — not red", "Blue (not red)", "Not red! Blue!", "Blue。",
        "¡Blue!", "blue、not red", "It isn’t red; it’s blue", "The colour is blue, the same as the sky", "- blue",
        "* **blue**", "1. blue", "`blue`", "### blue", "BLUE", "The blue option", "Option: blue", "Option blue",
        "answer = blue", "{\"answer\": \"B\"}", "{\"answer\": \"blue\"}", "B looks like the best match.",
        "B has the right colour", "B, which is blue.", "B, the blue one", "B (the blue car)",
        "B. A is the other car.", "B, C is the other car.", "a blue car", "A blue", "Be blue.", "Both are blue",
        "blue? yes",
    ]),
    (FOUR, None, [
        "A red, B green, C blue, D yellow", "(A) red, (B) green", "A red B green C blue D yellow",
        "a. red b. green c. blue d. yellow", "a) red b) green c) blue d) yellow", "A、red B、green C、blue D、yellow",
        "A - red, B - green, C - blue, D - yellow", "A = red, B = green", "[A] red [B] green [C] blue [D] yellow",
        "A. red\nB. green", "A) red / B) green / C) blue / D) yellow", "red\ngreen\nblue\nyellow",
        "- red\n- green\n- blue\n- yellow", "1. red 2. green 3. blue 4. yellow", "A, B, C, D", "A/B/C/D",
        "Question: which? A. red B. green C. blue D. yellow",
    ]),
    (YES_NO, "A", [
        "Yes.", "Yes, it isn't there.", "Yeah", "Yes, there are no cars", "yes, not no", "Yes: no doubt.",
        "I say yes, since there is no red car.", "A. Yes, there is no difference", "There is no difference, so yes.",
        "Yes they are.", "Yes!!!",
    ]),
    (YES_NO, "B", [
        "No, they are not the same.", "Nope.", "The answer is no.", "The answer is no because it is not there.",
        "no。", "No!", "Not yes", "No — the two differ", "no; yes would be wrong", "I would say no", "(B) No", "B No",
        "No cars are red, so no.", "no they aren't", "It is not so, no.", "No one is there.",
    ]),
    (YES_NO, None, [
        "Yes and no", "yes no", "correct",
    ]),
    (GROUPED, "A", [
        "1000", "1,000.", "It is 1,000 not 2,500",
    ]),
    (GROUPED, None, [
        "1 000", ".5", "0.50", "10.5", "10,5", "−10", "-10", "–10", "10-12", "1,000 or 2,500", "110",
    ]),
    (GROUPED, "D", [
        "0.5",
    ]),
    (GROUPED, "C", [
        "10%", "10 cars",
    ]),
    (GROUPED, "B", [
        "2500 cars",
    ]),
    (WORDS, "A", [
        "2",
    ]),
    (WORDS, "B", [
        "There are 3 cars.", "three",
    ]),
    (WORDS, "C", [
        "four, not five",
    ]),
    (WORDS, None, [
        "twenty-five",
    ]),
    (FRACTIONS, "A", [
        "1/2", "½", "1/2, not 1/3",
    ]),
    (FRACTIONS, "D", [
        "3/4", "¾",
    ]),
    (FRACTIONS, "B", [
        "It is 1/3.",
    ]),
    (FRACTIONS, None, [
        "11/2", "1/22",
    ]),
    (FRACTIONS, "C", [
        "1 / 4",
    ]),
    (PLACES, "A", [
        "to the left",
    ]),
    (PLACES, None, [
        "That's right, it is on the left.", "left, right?",
    ]),
    (PLACES, "B", [
        "on the right side",
    ]),
    (PLACES, "C", [
        "It is above, not below.",
    ]),
    (WHICH, None, [
        "Both.",
    ]),
    (WHICH, "C", [
        "Both images",
    ]),
    (WHICH, "A", [
        "The left image, not the right image.", "The left image and not both images", "left image",
    ]),
    (WHICH, "D", [
        "Neither image", "neither image shows it",
    ]),
    (TRUE_FALSE, "A", [
        "True", "The statement is not false.", "It's true that it isn't red.",
    ]),
    (TRUE_FALSE, None, [
        "This is not correct.",
    ]),
    (TRUE_FALSE, "B", [
        "false, not true",
    ]),
    (DIGITS, "C", [
        "3", "three", "There are three cars", "the red one: 3", "3 cars, not 4", "Image 2 has 3 cars", "$3", "3€",
        "#3", "3%", "C. 3",
    ]),
    (DIGITS, "A", [
        "one",
    ]),
    (DIGITS, None, [
        "2 + 1 = 3", "2.5", "3rd", "3/4", "3:00", "3 or 4", "C) 2",
    ]),
]  # fmt: skip
