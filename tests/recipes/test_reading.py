"""recipes/parts/reading.py, options.py, plain.py and equality.py: answers as models and data sets really write them."""

import pytest
from parts.answers import is_correct
from parts.equality import same_answer
from parts.options import read_options
from parts.reading import RULES, UNFINISHED, known_answer, read_answer
from parts.scoring import mark

OPTIONS = "Which? A. 10 cm B. 45° C. blue D. 12"
RESPONSES = [  # response, gold, rule, right
    ("the answer is **12**.", "12", "sentence", True), ("the correct answer is:\n\n**B. 45°**", "B", "sentence", True),
    ("The correct answer is:\n\nB", "B", "sentence", True), ("Yes, it is.", "Yes", "last line", True),
    ("Yes, the left circle is larger because it spans the whole of the picture's width.", "Yes", "sentence", True),
    ("No. The two lines have the same length, as measured with a ruler on it.", "No", "sentence", True),
    ("No. The two lines have the same length, as measured with a ruler on it.", "Yes", "sentence", False),
    ("**Final Answer**\n12", "12", "sentence", True),
    ("Steps.\n\n**Final Answer**\n\n$12$ cm", "12", "sentence", True), ("Answer:\nB", "B", "sentence", True),
    ("### Answer\n\n\\[\n12\n\\]", "12", "sentence", True), ("Final Answer: $\\frac{1}{2}$", "0.5", "sentence", True),
    ("We add.\n\nTherefore, the area is 24 cm².", "24", "sentence", True),
    ("We add 3 and 4 to get the sum that we need next.\nSo the angle is $45^\\circ$.", "45", "sentence", True),
    ("Thus, x = 5.\n", "5", "last line", True),
    ("We have it here, and it is long: 2x=10.\nHence, $x = 5$.", "5", "last line", True),
    ("Reasoning first.\n\n12", "12", "last line", True), ("Reasoning first.\n\n$$12$$", "12", "last line", True),
    ("-5", "-5", "last line", True), ("-5", "5", "last line", False),
    ("<answer>The correct answer is B</answer>", "B", "tag", True),
    ("<answer> B </answer><|im_end|>", "B", "tag", True), ("<answer>[B]</answer>", "B", "tag", True),
    ("<answer>B 45</answer>", "B", "tag", True), ("<answer>45 (B)</answer>", "B", "tag", True),
    ("<answer>**B**</answer>", "B", "tag", True), ("<answer>12", "12", "unfinished", False),
    ("<|begin_of_box|>12<|end_of_box|>", "12", "boxed", True),
    ("<thinking>a</thinking>The answer is 12", "12", "sentence", True),
    ("The answer is B because the angle is 45°.", "B", "sentence", True),
    ("The answer is 12. This follows from 3*4.", "12", "sentence", True),
    ("The answer is 12, which is option D.", "12", "sentence", True),
    ("The answer is 12, which is option D.", "D", "sentence", True),
    ("So option B is correct.", "B", "sentence", True), ("Therefore, the correct option is B.", "B", "sentence", True),
    ("The correct choice is (B).", "B", "sentence", True), ("B is the correct answer.", "B", "sentence", True),
    ("Option A is wrong. We take the other one, so the answer is B.", "B", "sentence", True),
    ("Option A is wrong.", "A", "sentence", False), ("Option A is not correct.", "A", "sentence", False),
    ("The answer is not 5.", "5", "sentence", False), ("The answer is not A.", "A", "sentence", False),
    ("The answer isn't 5.", "5", "unfinished", False),
    ("The answer is 5. Wait, no, it is 6.", "5", "last line", False),
    ("The answer is A, not B.", "A", "sentence", True), ("The answer is A, not B.", "B", "sentence", False),
    ("The answer is either A or B.", "A", "sentence", False), ("The answer is A or B.", "A", "sentence", False),
    ("So the answer is", "12", "unfinished", False), ("So the answer is:", "12", "unfinished", False),
    ("Let me think step by step.\nFirst, the sides are 3 and 4, and so", "5", "unfinished", False),
    ("I will answer this now.\nFirst, look at the angle of the", "5", "unfinished", False),
    ("The angle must satisfy 2x = 10. Then we", "10", "unfinished", False), ("#### 12", "12", "tag", True),
    ("He has 3+4=7 apples.\n7+5=12\n#### 12", "12", "tag", True), ("Answer: B", "B", "sentence", True),
    ("**Answer: B. 45°**", "B", "sentence", True), ("The answer to the question is 12.", "12", "sentence", True),
    ("The answer (in cm) is 12.", "12", "sentence", True), ("Answer = 12", "12", "sentence", True),
    ("Ans: 12", "12", "sentence", True), ("答案是 12", "12", "sentence", True), ("答案：B", "B", "sentence", True),
    ("B. 45°\n\nThe angle is half of the central angle, since it is inscribed in the circle.", "B", "sentence", True),
    ("B\n\nExplanation: it is inscribed, and so it is half of the central angle over there.", "B", "sentence", True),
    ("There are 5 apples in the picture that you have shown to me, as far as I can see it.", "5", "unfinished", False),
    ("There are 5 apples.", "5", "last line", True), ("There are 5 apples.", "6", "last line", False),
    ("The polygon has 5 sides.", "5", "last line", True), ("The value is 5 if x is 3.", "3", "last line", False),
    ("If x is 3, the value is 5.", "3", "last line", False),
    ("The first is 3 and the second is 5.", "5", "last line", False), ("x = 5 or y is 3", "3", "last line", False),
    ("The shape is not blue.", "blue", "last line", False), ("The answer is $\\boxed{12}$", "12", "boxed", True),
    ("\\boxed{\\text{The answer is } 12}", "12", "boxed", True), ("\\boxed{B. 45^\\circ}", "B", "boxed", True),
    ("The answer is: $$\\frac{3}{4}$$", "0.75", "sentence", True),
    ("Answer:\n\n$$\n\\frac{3}{4}\n$$", "0.75", "sentence", True),
    ("Therefore, the final answer is **(B)**.", "B", "sentence", True),
    ("The answer is therefore 12.", "12", "sentence", True),
    ("The answer is approximately 12.", "12", "sentence", True),
    ("The answer is that the area is 12.", "12", "sentence", True),
    ("The final answer is $12$. I hope it is correct.", "12", "sentence", True),
    ("So, the answer would be 12 apples.", "12", "sentence", True),
    ("The answer is 5 million.", "5", "sentence", False), ("The answer is 5 or more.", "5", "sentence", False),
    ("Answer: -5", "5", "sentence", False),
    ("Answer: -5", "-5", "sentence", True), ("**Answer:** yes", "Yes", "sentence", True),
    ("The answer is \"blue\".", "blue", "sentence", True), ("The ball is blue.", "blue", "last line", True),
    ("It is a blue ball.", "blue", "last line", False),
    ("Therefore, the length of $AB$ is $\\boxed{}$", "12", "unfinished", False),
    ("The area of the triangle is:\n\n24 cm²", "24", "last line", True), ("Answer choice B", "B", "last line", True),
    ("The best answer is C: blue", "C", "sentence", True), ("The answer is (C) blue.", "blue", "sentence", True),
    ("the answer is 1,000.", "1000", "sentence", True), ("The answer is 3.5.", "3.5", "sentence", True),
    ("The answer is 3.5.", "3", "sentence", False), ("Final Answer: The final answer is 12", "12", "sentence", True),
    ("*Answer*: 12", "12", "sentence", True), ("Answer: **12** ", "12", "sentence", True),
    ("__Answer__: 12", "12", "sentence", True), ("Answer: `12`", "12", "sentence", True),
    ("> **Answer:** 12", "12", "sentence", True), ("| Answer | 12 |", "12", "last line", False),
    ("I cannot determine the answer.", "12", "unfinished", False), ("", "12", "unfinished", False),
    ("<think>The answer is 12", "12", "unfinished", False),
    ("<think>The answer is 12</think>", "12", "unfinished", False),
    ("On additionne.\nLa réponse est 12.", "12", "sentence", True),
    ("La réponse correcte est : **B**", "B", "sentence", True), ("Die Antwort ist 12 cm.", "12", "sentence", True),
    ("Wir addieren.\nDie Antwort lautet: 12", "12", "sentence", True), ("Antwort:\n12", "12", "sentence", True),
    ("Sumamos.\nLa respuesta final es 12.", "12", "sentence", True), ("La risposta è 12.", "12", "sentence", True),
    ("Somamos.\nA resposta é 12.", "12", "sentence", True), ("Сложим.\n**Ответ:** 12", "12", "sentence", True),
    ("足します。\n答えは12です。", "12", "sentence", True), ("정답은 B입니다.", "B", "sentence", True),
    ("답: 12", "12", "sentence", True), ("La réponse est 13.", "12", "sentence", False),
    ("La réponse n'est pas 12.", "12", "last line", False), ("Die Antwort ist nicht 12.", "12", "sentence", False),
    ("Die Antwort ist 12 oder 13.", "12", "sentence", False), ("La respuesta es no 12.", "12", "sentence", False),
    ("La risposta non è 12.", "12", "last line", False), ("Ответ не 12.", "12", "last line", False),
    ("답은 12가 아닙니다.", "12", "sentence", False), ("答えは12ではない。", "12", "sentence", False),
    ("Blue\n\nExplanation: The sky is clear.", "blue", "sentence", True),
    ("12\n\n**Explanation:** we add 5 and 7.", "12", "sentence", True),
    ("12\n\nExplanation: 5+8", "13", "sentence", False), ("12\n\nExplanation: 5+8", "12", "sentence", True),
    ("12\n\nReasoning:\nWe add.\nThe total is known.", "12", "sentence", True),
    ("3\n\nReasoning: There are two cats on the left and one on the right.", "3", "sentence", True),
    ("5\n\nNote: The third one is hidden.", "5", "sentence", True),
    ("12\n\nBecause the sum is known.", "12", "sentence", True),
    ("We look at it.\nExplanation: we have 3 and 4. So the hypotenuse is 5.", "5", "sentence", True),
    ("Look.\nExplanation: we have 3 and 4. So the hypotenuse is 5.", "5", "sentence", True),
    ("It can be seen in the picture.\nExplanation: The total is 12.", "12", "unfinished", False),
    ("12 cm\n\nStep 1: Add. Step 2: The total is known.", "known", "unfinished", False),
    ("We add what stands in the picture.\nStep 2: The total is 12.", "12", "sentence", True),
    ("We add what stands in the picture.\nStep 2: So the ball is blue.", "blue", "sentence", True),
    ("A. 10 cm\nB. 45°\nC. blue\nD. 12", "D", "unfinished", False), ("A\nB\nC\nD", "D", "unfinished", False),
    ("This is what there is.\n(A) It is red\n(B) It is blue", "B", "unfinished", False),
    ("A. 10 cm\nB. 45°\nC. blue\nD. 12\nThe answer is B.", "B", "sentence", True),
    ("A. 10 cm\nB. 45°\nSo it must be the second.\nB", "B", "last line", True),
    ("It is not A, as we see.\nB", "B", "last line", True),
]  # fmt: skip
SAME = [  # answer, gold
    ("1990s", "1990s"), ("1990’s", "1990s"), ("1980s", "1980 s"), ("1200s", "1200"), ("1800s", "1800"),
    ("t = 3600s", "3600"), ("6000s", "6000"), ("20s", "20"), ("5s", "5 s"), ("5t", "5"), ("5t", "5 tonnes"),
    ("12d", "12 days"), ("25c", "25 cents"), ("20c", "20°C"), ("5m", "5"), ("5h", "5 hours"), ("45o", "45"),
    ("a - b", "a-b"), ("$a - b$", "$a-b$"), ("a - 2", "-2 + a"), ("b", "B"), ("2010–2015", "2010 - 2015"),
    ("$10 - $20", "$10-$20"), ("10-3=7", "7"),
    ("Sept 5, 2020", "September 5, 2020"), ("Jun 2020", "June 2020"),
    (r"24\text{ cm}^2", "24"), (r"36\pi \mathrm{~cm}^{2}", r"36 \pi \mathrm{~cm}^{2}"), (r"9.8\ \text{m/s}^2", "9.8"),
    (r"36\pi \mathrm{~cm}^{2}", r"36\pi"), ("S_{ABC}=12", "12"), (r"\text{Volume}=120", "120"), ("|AB|=5", "5"),
    ("P=(2,-3)", "(2,-3)"), ("B(2,-3)", "(2,-3)"), ("(2,-3)", "P(2, -3)"), (r"\approx 3.5", "3.5"), ("about 12", "12"),
    (r"x \approx 3.5", "3.5"), ("4pi", r"4\pi"), ("2pi/3", r"\frac{2\pi}{3}"), ("2*sqrt(3)", r"2\sqrt{3}"),
    ("sqrt(3)/2", r"\frac{\sqrt{3}}{2}"), (r"\sin 30^\circ", "0.5"), (r"\sin 30^\circ", r"\frac{1}{2}"),
    (r"\tan(45°)", "1"), (r"\cos 60^{\circ}", "1/2"), (r"45{}^\circ", "45"), (r"45{}^\circ", r"45^\circ"),
    (r"45^{\circ}", "45°"), ("45^o", "45"), (r"12\mbox{ cm}", "12"), (r"12\mbox{ cm}", "12 cm"), (r"5\,\Omega", "5"),
    (r"5\,\Omega", "5 ohms"), (r"5\,\text{k}\Omega", "5000 Ω"), (r"3 kg\cdot m/s", "3"),
    (r"3 kg\cdot m/s", r"3 \text{ kg m/s}"), ("€5", "5"), ("€5", "5 euros"), ("5€", "€5"), ("£12.50", "12.5"),
    ("60 min", "1 hour"), ("1 hour", "60 minutes"), ("1 hour 30 minutes", "90 min"), ("5 ft 3 in", "63 inches"),
    (r"x \in (1,3)", "(1,3)"), ("(1,3)", r"x \in (1,3)"), ("5;", "5"), ("5,", "5"), ("5 million", "5000000"),
    ("2.5 million", "2,500,000"), ("2 thirds", "2/3"), ("two thirds", r"\frac{2}{3}"), ("5 squared", "25"),
    ("3 dozen", "36"), ("half", "0.5"), ("three", "3"), ("twenty-five", "25"), ("2 pi", r"2\pi"),
    ("5 square units", "5"), ("10 square meters", "10 m^2"), ("10 sq. cm", "10 cm^2"), ("3 m/s^{-1}", "3"),
    ("7 m s^{-1}", "7 m/s"), ("5 meters per second squared", "5 m/s²"), (r"5 \mu m", "5 µm"),
    (r"25^\circ\text{C}", "25"), ("25 °C", "25 degrees Celsius"), ("25 °C", "77 °F"), ("10 years old", "10"),
    ("12 students", "12"), ("5 red apples", "5"), ("100 people", "100"), ("3 kWh", "3000 Wh"),
    (r"\angle ABC = 45^\circ", "45"), (r"m\angle ABC = 45^\circ", "45°"), ("f(x) = 2x+1", "2x+1"),
    (r"\frac{dy}{dx} = 2x", "2x"), (r"AB = 5\text{ cm}", "5"), (r"\overline{AB} = 5", "5"),
    (r"x = \frac{1}{2}", "0.5"), ("The area is 24 cm^2", "24"), (r"\text{Area} = 24", "24"), ("Area: 24", "24"),
    ("3*8 = 24", "24"), ("(2, -3)", "(2,-3)"), ("x=2, y=3", "(2,3)"), ("red, blue", "blue and red"),
    ("2 cm, 3 cm", "2,3"), ("A(1,2), B(3,4)", "A(1,2), B(3,4)"), (r"2\sqrt{3} \approx 3.46", r"2\sqrt{3}"),
    (r"2\sqrt{3} \approx 3.46", "3.46"), (r"1 \le x < 3", "[1,3)"), (r"x \ge 2", r"[2, \infty)"), ("**12**", "12"),
    ("`12`", "12"), ("\"blue\"", "blue"), ("Yes, it is.", "Yes"), ("No, they are not", "no"), ("yes", "Yes."),
    (r"\mathbf{12}", "12"), (r"\textbf{(B)}", "B"), (r"{\rm 12~cm}", "12"), (r"12\;\mathrm{cm}", "12"),
    (r"12\hspace{2pt}\text{cm}", "12"), (r"0.\overline{3}", "1/3"), ("5 percent", r"5\%"), ("5 %", "5%"),
    (r"-5^\circ", "-5"), ("US$5", "5"), ("$5 million", "5000000"), (r"\$1,200.50", "1200.5"),
    ("30 mph", "30 miles per hour"), ("3^{1/2}", r"\sqrt{3}"), ("x^(1/2)", r"\sqrt{x}"), (r"1\frac{1}{2}", "3/2"),
    ("1½", "1.5"), ("ln(2)", r"\ln 2"), ("x**2", "x^2"), ("45 degrees", "45°"), ("3:2", "3/2"), ("20 N·m", "20"),
    ("20 N·m", "20 J"), ("1200 cm³", "1.2 L"), ("5.0 × 10^3", "5000"), ("5.0e3 m", "5 km"), ("1e-9 m", "1 nm"),
    ("{1, 2}", r"\{2,1\}"), (r"\{5\}", "5"), (r"\text{B. } 45^\circ", "B"), ("[1, 2]", "[1,2]"),
    (r"\theta = 30^\circ", "30"), ("12.0 cm", "12 cm"), ("5 hours and 30 minutes", "5.5 hours"),
    ("roughly 5 km", "5000 m"), ("~12", "12"), (r"8\text{units}", "8"), ("the square root of 3", r"\sqrt{3}"),
    ("isosceles", "Isosceles"), ("5 A", "5"), (r"72\text{ km}\cdot\text{h}^{-1}", "20 m/s"), (r"\boxed{12}", "12"),
    ("The answer is 12", "12"), (r"\text{The answer is } 12", "12"), (r"\dfrac{3}{4}\text{ cup}", "3/4"),
    (r"3 \text{ and } 5", "3, 5"), (r"\pm 3", "3, -3"), (r"1 \pm \sqrt{2}", r"1+\sqrt2, 1-\sqrt2"),
    (r"12\text{cm}", "12"), ("12cm^2", "12"), (r"x=5\text{ or }x=3", "3,5"), (r"\text{Yes}", "yes"),
    (r"A=\pi r^2", r"\pi r^2"), (r"-\frac{1}{2}", "-0.5"), ("'blue'", "blue"), ("3 : 4", "3:4"), ("5 units", "5"),
    ("approximately 5 cm", "5 cm"), ("10 m", "1000 cm"), ("2:30 pm", "2:30 PM"), ("5 in", "5"), ("x>3", "3<x"),
    ("100{,}000", "100000"), (r"2\times3=6", "6"), (r"\left\{2,1\right\}", "1,2"), ("H_2O", "H_2O"), ("CO2", "CO2"),
    (r"V_{cyl} = 36\pi", r"36\pi"), (r"\triangle ABC = 12", "12"), (r"S_{\triangle ABC} = 12", "12"),
    (r"\text{Area of } \triangle ABC = 12", "12"), (r"\text{Perimeter} = 12\text{ cm}", "12"),
    (r"\vec{a} = (1,2)", "(1,2)"), ("A' = (1,2)", "(1,2)"), ("M(1, 2)", "(1,2)"),
    (r"\left( \frac{1}{2}, 3 \right)", "(0.5, 3)"), ("C(-1, 0, 2)", "(-1,0,2)"), (r"\simeq 3.5", "3.5"),
    (r"\approx 12\text{ cm}", "12 cm"), ("≈3.5", "3.5"), ("around 12 cm", "12"), ("approx. 12", "12"),
    ("3pi/4", r"\frac{3\pi}{4}"), ("pi/2", r"\frac{\pi}{2}"), ("2*pi*r", r"2\pi r"),
    ("sqrt(2)*sqrt(3)", r"\sqrt{6}"), ("3*sqrt(2)/2", r"\frac{3\sqrt{2}}{2}"), ("5sqrt(2)", r"5\sqrt{2}"),
    ("5√2 cm", r"5\sqrt2"), (r"\cos(60^\circ)", "0.5"), (r"\cos{60^\circ}", "0.5"),
    (r"\tan 60^\circ", r"\sqrt{3}"), (r"2\sin 30^\circ", "1"), (r"\sin^2 30^\circ", "1/4"),
    (r"30^{\text{o}}", "30"), (r"30\degree", "30°"), (r"30^\circ{}", "30"), (r"90 \,^\circ", "90"),
    (r"5\mbox{m/s}", "5"), (r"5\textrm{ kg}", "5 kg"), (r"5\,\mathrm{k\Omega}", "5"),
    (r"5\ k\Omega", r"5000\ \Omega"), (r"220\,\mathrm{V}", "220"), (r"10\ \mathrm{m\cdot s^{-1}}", "10 m/s"),
    (r"10\ \mathrm{m\cdot s^{-1}}", "10"), ("8.31 J/(mol·K)", "8.31"), (r"8.31\ \mathrm{J/(mol\cdot K)}", "8.31"),
    ("5 kg·m/s²", "5 N"), (r"3 \times 10^8 \text{ m/s}", "3e8"), (r"3 \times 10^8 \text{ m/s}", r"3\times10^8"),
    ("6.02e23", r"6.02 \times 10^{23}"), ("$12", "12 dollars"), ("12 USD", "$12"), ("₹500", "500"),
    ("¥100", "100 yen"), ("50 cents", "0.5 dollars"), ("120 s", "2 minutes"), ("1.5 h", "90 min"),
    ("2 days", "48 hours"), ("1 km", "1000 m"), ("1 m^2", "10000 cm^2"), ("1 m³", "1000 L"), ("36 km/h", "10 m/s"),
    ("100 cm", "1 m"), ("1 kg", "1000 g"), (r"x \in [2, 5)", "[2,5)"), (r"x \in (-\infty, 3]", r"(-\infty, 3]"),
    (r"x\in\{1,2\}", "1,2"), (r"y \in (0, 1)", "(0,1)"), ("12:", "12"), ("(12)", "12"), ("(12 cm)", "12"),
    ("5 meter", "5 m"), ("5 metres", "5 m"), ("5 kilograms", "5 kg"), ("5 Kilometers", "5 km"),
    ("3 million dollars", "3000000"), ("3 hundred", "300"), ("1.2 billion people", "1200000000"),
    ("three quarters", "0.75"), ("a half", "1/2"), ("one third", r"\frac{1}{3}"), ("seven", "7"), ("Twelve", "12"),
    ("twelve apples", "12"), ("5 children", "5"), ("5 triangles", "5"),
    ("3 boys and 2 girls", "3 boys and 2 girls"), ("no", "No."), ("True", "true"), (r"\text{No}", "no"),
    (r"x=3 \text{ and } y=2", "x=3, y=2"), ("(x,y)=(3,2)", "(3,2)"), ("y = 2x + 3", "y=3+2x"), ("y=2x+3", "2x+3"),
    (r"\frac{3}{4}", r"75\%"), ("1:2", r"\frac12"), ("1 : 2", "1:2"), ("2^{10}", "1024"), ("-0", "0"), ("+5", "5"),
    ("5.00", "5"), (".5", "0.5"), ("1,234,567", "1234567"), ("1 234 567", "1234567"), ("12,5", "12,5"),
    (r"\frac{-1}{2}", r"-\frac12"), (r"A \text{ and } C", "A, C"), ("A,B,D", "D, A, B"), ("3 ft 6 in", "42 in"),
    ("1 min 30 s", "90 seconds"), ("2 hours 15 minutes", "2.25 hours"), ("5 ft 3 in", "5.25 ft"), ("10 %", "0.1"),
    ("the blue ball", "blue ball"), ("a dog", "dog"), ("Dog", "dog"), ("New York", "new york"),
    ("12 o'clock", "12 o'clock"), (r"\text{cannot be determined}", "Cannot be determined"),
    (r"\mathbb{R}", r"\mathbb{R}"), (r"\emptyset", "∅"), (r"[-1, \infty)", r"x \ge -1"), ("x > 2", r"(2, \infty)"),
    ("-2 < x < 2", "(-2, 2)"), (r"24\;\text{cm}^{2}", r"24\,cm^2"), ("24 cm squared", "24 cm^2"),
    ("24 centimeters squared", "24 cm²"), ("24 sq cm", "24 cm²"), ("24 square centimetres", "24 cm^2"),
    ("5 cubic meters", "5 m³"), (r"\boxed{24\text{ cm}^2}", "24"), (r"24 \text{ (cm}^2)", "24"),
    ("24 (cm^2)", "24"), ("24 [cm^2]", "24"), ("60 degrees", r"60^\circ"), ("60 deg", "60"),
    ("1/2 mile", "0.5 miles"), (r"\frac{1}{2} mile", "0.5"), (r"\frac{\pi}{6} rad", "30°"), ("2π rad", r"2\pi"),
    ("k=3", "3"), ("n = 7 sides", "7"), ("a_n = 2n+1", "2n+1"), ("f'(x) = 2x", "2x"), ("P(A) = 0.5", "0.5"),
    ("P(A|B) = 0.5", "0.5"), (r"\log_2 8 = 3", "3"), ("|x| = 5", "|x| = 5"), ("|AB| = |CD| = 5", "5"),
    ("AB = CD = 5", "5"), ("a = b = 3", "3"), (r"BC = 2\sqrt{3} \approx 3.46", r"2\sqrt{3}"),
    ("x = 1.5 cm", "1.5"), (r"m = -\frac{2}{3}", "-2/3"), (r"\angle A = 30^\circ", "30"), ("∠A = 30°", "30"),
    ("∠ABC=30°", "30°"), ("30° C", "30"), (r"\overset{\frown}{AB} = 60^\circ", "60"),
    (r"\widehat{AB} = 60^\circ", "60"),
    ("500 cents", "$5"), ("$5.50", "550 cents"), ("$5$", "5"), ("$5 million", "5000000"), ("１２", "12"), ("٣", "3"),
    ("१२", "12"), ("３：４５", "3:45"), ("Ｂ", "B"), ("⅓", "1/3"), ("2⅔", "8/3"), ("5½", "5.5"), ("1⁄2", "0.5"),
    ("2⁴", "16"), ("10⁻³", "0.001"), ("xⁿ", "x^n"), ("x₁₂", "x_{12}"), ("x₁", "x_1"), ("①", "1"), ("Ⓑ", "B"),
    ("minus five", "-5"), ("negative 5", "-5"), ("negative two thirds", "-2/3"), ("minus five apples", "-5 apples"),
    ("one hundred and twenty-three", "123"), ("twelve thousand three hundred forty-five", "12345"),
    ("a hundred", "100"),
    ("three and a half", "3.5"), ("two and two thirds", "8/3"), ("three and a half hours", "3.5 hours"),
    (r"\log_2 8", "3"), (r"\log_{10} 100", "2"), ("5^-1", "0.2"), ("x^-2", "x^{-2}"), ("A∪B", r"A \cup B"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
    ("January 5, 2023", "2023-01-05"), ("5th of January 2023", "Jan. 5, 2023"), ("5 January", "Jan 5"),
    ("3:45 pm", "15:45"), ("3 p.m.", "15:00"), ("12:05 am", "0:05"), ("03:45", "3:45"),
    ("10^-3 m", "1 mm"), ("10^-0.5", "10^{-0.5}"), ("10:5", "2"), ("1:12", "1 : 12"),
    ("13:45", "13 : 45"), ("5 am", "5:00 am"),
]  # fmt: skip
OTHER = [
    ("1990s", "1990"), ("1990", "1990s"), ("1980s", "1990s"), ("1850", "1850s"), ("2010's", "2010"),
    ("2 pi", "2"), (r"2\pi", "2"), ("5 or more", "5"), ("at least 5", "5"), ("5 million", "5"),
    ("5 million", "5 billion"), ("2 thirds", "2"), ("2 thirds", "3"), ("5 squared", "5"), ("5 cubed", "5"),
    ("5 more", "5"), ("5 more apples", "5"), ("more than 5", "5"), ("less than 5", "5"), ("5 or 6", "5"),
    ("5 and 6", "6"), ("5 plus 3", "5"), ("5 times", "5"), ("5 minus 2", "5"), ("5 hundred", "5"), ("5 dozen", "5"),
    ("5 half", "5"), ("5 halves", "5"), ("3 quarters", "3"), ("5 to 7", "5"), ("between 5 and 7", "5"), ("not 5", "5"),
    ("not blue", "blue"), ("5+", "5"), ("5-", "5"), ("5?", "5"), ("5x", "5"), ("5 x", "5"), ("5!", "5"),
    (r"\sqrt{5}", "5"), ("5i", "5"), (">5", "5"), (r"\ge 5", "5"), (r"\neq 5", "5"), (r"x \ne 5", "5"), ("x>5", "5"),
    (r"\pm 5", "5"), (r"5\pm1", "5"), ("5_2", "5"), ("101_2", "101"), ("2x = 10", "10"), ("x^2=4", "4"),
    ("x+y=5", "5"), ("x=5", "y=5"), ("S_{ABC}=12", "S_{ABD}=12"), ("P(2,-3)", "Q(2,-3)"), ("(2,-3)", "(5,1)"),
    ("P=(2,-3)", "(-3,2)"), (r"x \in (1,3)", "[1,3]"), (r"x \in (1,3)", "(1,4)"), ("1<x<3", "[1,3]"),
    (r"x\ge 2", r"(2,\infty)"), ("€5", "$5 dollars"), ("€5", "£5"), ("€5", "€6"), ("60 min", "60 hours"),
    ("60 min", "2 hours"), ("1 hour 30 minutes", "1 hour"), ("1 hour 30 minutes", "130 minutes"), ("5 cm", "5 mm"),
    ("5 MW", "5 mW"), ("5 kg", "5 km"), (r"5 \Omega", "5 V"), ("24 cm^2", "24 cm^3"), ("9.8 m/s", "9.8 m/s^2"),
    (r"36\pi cm^2", "36 cm^2"), ("4pi", "4"), ("2*sqrt(3)", "2*3"), (r"\sin 30^\circ", "30"), (r"\sin 30", "0.5"),
    (r"\sin 30^\circ", r"\cos 30^\circ"), ("0.0000000001", "0.0000000002"), ("1e-10", "2e-10"), ("1e-10", "0"),
    ("about 12", "13"), ("3.14", r"\pi"), (r"\approx 3.14", r"\pi"), ("B. 45", "A. 45"), ("A or B", "A"),
    ("either A or B", "B"), ("not A", "A"), ("A dog", "A"), ("AC", "A"), ("no", "No solution"), ("Yes and no", "Yes"),
    ("Yes, it is.", "No"), ("No, it is not.", "Yes"), ("unknown", "5"), ("1,2,3", "1,2"), ("red, blue", "red"),
    ("red", "blue"), (r"\{1,2\}", "(1,2)"), ("12", "1.2"), ("1.200", "1200"), ("1,2", "1.2"), ("50%", "5"),
    ("0.5%", "0.5"), ("25 °C", "25 K"), ("25 °C", "25 °F"), ("5 am", "5 pm"), ("5 pm", "5"), ("3:45 pm", "3:45 am"),
    ("5th", "5"), ("fifth", "5"), ("1/2", "2"), (r"12\frac{1}{2}", "6"), ("2^3", "23"), ("R", "r"),
    (r"\pi R^2", r"\pi r^2"), ("5 apples", "5 oranges"), ("5 students", "5 teachers"), ("10^5", "105"),
    ("x=2, y=3", "(3,2)"), ("step 5", "5"), ("Step 2", "2"), ("5% more", "5%"), ("5 if x>0", "5"), ("5 thousand", "5"),
    ("0", r"\emptyset"), (r"\infty", "0"), (r"-\infty", r"\infty"), ("-5", "5"), (r"\text{not } 5", "5"),
    ("5 choose 2", "5"), ("log_2 5", "5"), ("|x|=5", "x"), ("5 mod 3", "5"), (r"5 \mod 3", "5"), ("5:00", "5"),
    ("2+2=5", "4"), ("5 - 6", "5"), ("none", "0"), ("five hundred", "5"), ("two hundred", "2"), ("twenty-five", "20"),
    ("one half", "1"), ("one third", "1"), ("a third", "3"), ("a dozen", "1"), ("5 e", "5"), ("5 squares less", "5"),
    ("f(x)=2x", "g(x)=2x"), ("1, 2", "x=1, x=3"), ("5 cm or 6 cm", "5 cm"), ("5 to 1", "5"), ("0.333", "1/3"),
    ("33%", "1/3"), (r"\frac{1}{2}", r"\frac{1}{3}"), ("5 feet", "5 inches"), ("5 squared cm", "25"),
    (r"5\text{ or more}", "5"), (r"5\text{ million}", "5"), ("minus 5", "5"), ("negative 5", "5"),
    ("five or more", "5"), ("-x", "x"), ("AB", "BA"), ("CO", "CO2"), ("H2O", "H2"), ("12 3", "123"), ("3 12", "36"),
    ("5 10", "50"), ("2 3", "6"),
    ("5 or fewer", "5"), ("5 at most", "5"), ("up to 5", "5"), ("over 5", "5"), ("5 out of 6", "5"),
    ("5 of 6", "5"), ("5 per 6", "5"), ("5/6", "5"), ("5 in 6", "5"), ("5 billion", "5"), ("5 dozen eggs", "5"),
    ("5 hundred people", "5"), ("5 thousand dollars", "5"), ("5 tenths", "5"), ("5 hundredths", "5"),
    ("5 percent", "0.5"), ("5 thirds pi", "5"), ("5 pi cm", "5 cm"), ("5e", "5"), ("5 e", "5"), ("5 root 2", "5"),
    ("5 sqrt 2", "5"), ("5 squared cm", "5"), ("5 log 2", "5"), ("5 factorial", "5"), ("minus five", "5"),
    ("5 negative", "5"), ("5 times 2", "5"), ("5 and a half", "5"), ("5 and a half", "2.5"), ("5 halves", "2.25"),
    ("5 plus", "5"), ("5ish", "5"), ("5 unless x is 0", "5"), ("almost 5", "6"), ("never 5", "5"),
    ("5 is wrong", "5"), ("5 apples or 6 apples", "5 apples"), ("5 m or 6 m", "5"), ("x < 5", "5"),
    ("x=5 or x=6", "5"), (r"x=\pm5", "5"), ("f(5)", "5"), (r"\sqrt[3]{5}", "5"), (r"\log 5", "5"), ("5^{-1}", "5"),
    ("5^0", "5"), ("5'", "5"), ("-5^2", "25"), ("0.5", "5"), ("50", "5"), ("5,000", "5"), ("5.000.000", "5"),
    (r"\frac{5}{1}x", "5"), ("5y", "5"), ("5n+1", "5"), ("(5,5)", "5"), ("[5,6]", "5"), (r"\{5,6\}", "5"),
    ("5:6", "5"), ("5 cm^2", "5 cm"), ("5 cm/s", "5 cm"), ("5 cm", "5 inches"), ("5 km/h", "5 m/s"),
    ("5 min", "5 s"), ("5 kg", "5 g"), ("5 °F", "5 °C"), ("5 N", "5 J"), ("5 V", "5 W"), ("€5", "¥5"),
    ("£5", "$5 USD"), ("5 cents", "5 dollars"), ("1 hour 30 minutes", "1.3 hours"), ("1 hour", "90 min"),
    (r"x \in (1,3]", "(1,3)"), (r"x \in (1,3)", "(3,1)"), ("P(2,-3)", "(2,3)"), ("P=(2,-3)", "2"),
    ("B(2,-3)", "B"), ("|AB|=5", "|AC|=5"), (r"\text{Volume}=120", "12"), ("S=12", "13"), ("4pi", r"4\pi^2"),
    ("2*sqrt(3)", r"\sqrt{6}"), (r"\sin 30^\circ", r"\frac{\sqrt3}{2}"), (r"\sin 60^\circ", "0.5"),
    ("10^{-10}", "10^{-11}"), ("1.0000000", "1.0001"), ("6.02e23", "6.03e23"), ("3e-5", "4e-5"),
    ("0.0000004", "0.0000001"), ("99999999", "99999998"), ("Yes", "No"), ("Yes or no", "Yes"), ("Yes, no", "Yes"),
    ("Neither", "No"), ("Not yes", "Yes"), ("no dogs", "dogs"), ("not a dog", "dog"), ("a dog and a cat", "a dog"),
    ("hotdog", "dog"), ("black", "blue"), ("blue-green", "blue"), ("left", "right"), ("A, B", "A"), ("AB", "A"),
    ("None of A or B", "A"), ("all but A", "A"), ("A is wrong", "A"), ("B'", "B"), ("3", "three hundred"),
    ("thirteen", "3"), ("second", "2"), ("two and a half", "2"), ("one hundred", "1"),
    ("12 o'clock", "11 o'clock"), ("3:45", "3:54"), ("2024", "24"), ("2,024", "24"), ("x^2+1", "x^2-1"),
    ("y=2x+3", "y=2x-3"), ("y = 2x", "x = 2y"), ("2x", "x^2"), ("x_1", "x_2"), ("a_1=5", "a_2=5"),
    (r"\text{increase}", r"\text{decrease}"), (r"5 \text{ to } 7", "7"), ("5, 6, 7", "5, 6"), ("5-7", "5"),
    ("1, 2", "2, 3"), (r"\frac{5}{7}", r"\frac{7}{5}"), ("15", "1.5"), ("0", "no"), ("0", "none"), ("1", "yes"),
    (r"\infty", "8"), ("5 A.M.", "5 P.M."), ("5.5.5", "5.5"), ("127.0.0.1", "127"), ("2023-01-05", "2017"),
    ("2 1/2", "1"), ("1/0", "0"), ("5 boxes of 6", "5"), ("5 dozens", "5"), ("5 pairs of 2", "5"),
    (r"\text{about } 5 \text{ or } 6", "5"), ("approximately 12", "12.3"), (r"\approx 3.5", "3.4"),
    ("5 cents", "$5"), ("$500", "5 cents"), ("$5 and $6", "$5"), ("１２", "13"), ("⅓", "13"), ("2⅔", "22/3"),
    ("1⁄2", "12"), ("2⁴", "24"), ("5⁻¹", "5"), ("x₁", "x1"), ("x₁", "x₂"), ("①", "2"), ("①②", "12"), ("Ⓑ", "C"),
    ("minus five", "five"), ("negative two thirds", "2/3"), ("minus x", "x"), ("one hundred and five", "100"),
    ("nineteen eighty-four", "103"), ("twenty and five", "25"), ("two and three", "5"), ("two hundred and", "200"),
    ("twenty-first", "21"), ("three and a half", "3"), ("three and a half", "7/2 hours or so"),
    (r"\log_2 5", r"\log_3 5"), (r"\log_2 8", "4"), (r"\log_2 5", "2.5"), ("5^-1", "4"),
    ("x^-2", "x^2"), ("2^-3x", "x/8"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&3\\2&4\end{bmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    ("A∪B", "A∩B"), (r"A \cup B", r"A \cap B"), ("A∪B", "A"), ("A + B", "A + C"), ("A + B", "A"),
    ("01/05/2023", "2023-01-05"), ("12/11/2023", "12 November 2023"), ("January 5, 2023", "2023-05-01"),
    ("Jan 5", "2023-01-05"), ("Jan 5", "5"), ("5 May 2023", "5 May 2024"), ("3:45 pm", "3:45"), ("3:45 am", "3:45"),
    ("12:30 am", "12:30"), ("3 pm", "15"), ("12 pm", "0:00"), ("r", "R"),
    ("a - 2b", "2b"), (r"a - \sqrt{2}", r"\sqrt{2}"), ("a - b", "1 b"), (r"A \setminus B", "A"), (r"A \neq B", "A"),
    ("2010-2015", "2011-2016"), ("2019-20", "2020-21"), ("3-1", "2-0"), ("$10-$20", "$20-$30"), ("2-1", "1"),
    ("10-20 years", "20-30 years"), ("555-1234", "556-1235"), ("12-25-2020", "12-26-2019"),
    ("Sept 5, 2020", "Sept 6, 2020"), ("Jun 2020", "Jun 2021"),
    (r"5 \text{ cm}^2", r"5 \text{ cm}^3"), ("5 mg", "5 Mg"), ("5 mm", "5 Mm"), ("5 Pa", "5 pA"),
]  # fmt: skip


@pytest.mark.parametrize(("response", "gold", "rule", "right"), RESPONSES)
def test_a_response_is_read_as_a_person_reads_it(response, gold, rule, right):
    found = read_answer(response)
    assert (found[1] if found else UNFINISHED) == rule and rule in (*RULES, UNFINISHED)
    options = read_options(OPTIONS) if gold in "ABCD" else {}
    assert bool(found and same_answer(found[0], known_answer(gold), options)) is right


@pytest.mark.parametrize(("answer", "gold"), SAME)
def test_the_same_answer_written_otherwise(answer, gold):
    assert same_answer(answer, gold, {})


@pytest.mark.parametrize(("answer", "gold"), OTHER)
def test_what_only_looks_the_same(answer, gold):
    assert not same_answer(answer, gold, {})


@pytest.mark.parametrize(("written", "known"), [
    ("<answer> 145° </answer>", "145°"), ("#### 12", "12"), ("He has 3 + 4 = 7.\n#### 7", "7"),
    ("Since 3 + 4 = 7, it is the second.\nAnswer: B", "B"), ("Step 1: add.\nThe answer is 12.", "12."),
    ("<think>so</think><answer>12</answer>", "12"), ("<think>so</think>\n\n12", "12"),
    ("so it is $\\boxed{12}$.", "12"),
    ("Therefore, the answer is \\(12\\)", "\\(12\\)"), ("<CONCLUSION>12</CONCLUSION>", "12"), ("Reasons.\n\n12", "12"),
    ("12 cm", "12 cm"), ("The ball is blue", "The ball is blue"), ("B. 45°", "B. 45°"), ("-5", "-5"),
    ("<think>five</think>", ""), ("<think>five", ""), ("", ""),
])  # fmt: skip
def test_a_known_answer_is_read_by_the_same_rules(written, known):
    assert known_answer(written) == known


@pytest.mark.parametrize("gold", ["<answer> 145° </answer>", "It is so.\n#### 145", "So it is.\nAnswer: 145 degrees"])
def test_both_sides_go_through_the_whole_way(gold):
    assert mark("<think>a</think>The angle is **145°**.", gold, "") == (True, "last line")
    assert mark("The angle is 154°.", gold, "") == (False, "last line")
    assert mark("<think>The angle is 145", gold, "") == (False, UNFINISHED)


@pytest.mark.parametrize("question", [
    "Which? A. 24; B. 25; C. 26", "A: 24, B: 25, C: 26", "A) 24\nB) 25\nC) 26", "[A] 24 [B] 25 [C] 26",
    "(A) 24 (B) 25 (C) 26", "A 24\nB 25\nC 26", "**A.** 24\n**B.** 25\n**C.** 26", "- A. 24\n- B. 25\n- C. 26",
    "A. 24 | B. 25 | C. 26", "A、24 B、25 C、26", "A.24 B.25 C.26", "Point A. Which? A. 24 / B. 25 / C. 26",
    "A. 24; B. 25; C. 26. Please answer with the letter.", "{'A': '24', 'B': '25', 'C': '26'}",
    "Choices: (A) 24; (B) 25; (C) 26.\nSelect one.",
])  # fmt: skip
def test_options_however_they_are_separated(question):
    assert {letter: text.rstrip(".") for letter, text in read_options(question).items()} == {
        "A": "24", "B": "25", "C": "26",
    }  # fmt: skip
    for answer in (
        "25",
        "B",
        "(B)",
        "[B]",
        "**B**",
        "B 25",
        "25 (B)",
        "B. 25",
        "The correct answer is B",
        "b",
        "option B",
    ):
        assert same_answer(answer, "B", read_options(question)), answer
        assert not same_answer(answer, "C", read_options(question)), answer
        assert same_answer(answer, "25", read_options(question)), answer


def test_an_answer_that_two_options_can_mean_is_neither():
    options = read_options("A. 5 cm B. 5 m C. a dog D. 500 cm")
    assert not same_answer("5", "A", options) and not same_answer("5", "B", options)
    assert same_answer("5 m", "B", options) and not same_answer("5 m", "D", options)
    assert same_answer("A dog", "C", options) and not same_answer("A dog", "A", options)
    assert same_answer("AC", "A, C", options) and not same_answer("AC", "A", options)


@pytest.mark.parametrize("length", [20_000, 50_000])
@pytest.mark.parametrize("form", ["{}", r"\boxed{{{}}}", "The answer is {}.", "<answer>{}</answer>"])
def test_long_numbers_are_compared_digit_by_digit(form, length):
    """Takes milliseconds; rules that look at each digit from each other digit take minutes."""
    number = "7" * length
    assert is_correct(form.format(number), number) and not is_correct(form.format(number), f"{number[:-1]}8")
    assert not is_correct(form.format(number), "7") and not is_correct("7", number)


@pytest.mark.parametrize(
    "piece", ["(", "[", "{", "*", "`", "$", "\\[", "answer is ", "best ", "a b ", " ", "<answer>", "A. "]
)
def test_no_response_keeps_the_rules_busy(piece):
    assert not mark(piece * 8000 + "x.", "5", piece * 8000)[0]
