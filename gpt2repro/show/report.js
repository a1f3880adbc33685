// A slider for the samples of each run: one step's are shown at a time.
for (const section of document.querySelectorAll(".samples")) {
  const slider = section.querySelector("input");
  const step = section.querySelector("output");
  const samples = [...section.querySelectorAll("[data-step]")];
  const show = () => {
    samples.forEach((sample, number) => { sample.hidden = number !== Number(slider.value); });
    step.value = samples[slider.value].dataset.step;
  };
  slider.addEventListener("input", show);
  show();
}
