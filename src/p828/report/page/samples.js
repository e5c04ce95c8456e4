"use strict";
// What the run in focus wrote, over time.

function showSamples(view) {
  const { samples } = view.focus;
  const slider = document.getElementById("sample-step");
  document.getElementById("samples").hidden = !samples.length;
  document.querySelector("#samples h2").textContent = view.named("Samples");
  if (!samples.length) return;
  const isNew = slider.dataset.run !== String(view.focus.number) || slider.value === slider.max;
  Object.assign(slider, { max: samples.length - 1 });
  slider.dataset.run = view.focus.number;
  if (isNew) slider.value = samples.length - 1;
  slider.oninput = () => {
    const one = samples[slider.value];
    document.getElementById("sample-name").value = one.step;
    document.getElementById("sample-texts").replaceChildren(...one.samples.map(([prompt, text]) =>
      made("pre", {}, [made("b", {}, [prompt ?? ""]), text ?? ""])));
  };
  slider.oninput();
}
