// A click on a thumbnail shows it larger; Escape, the button or a click outside closes the dialog.
const dialog = document.querySelector("dialog");
document.addEventListener("click", (event) => {
  const button = event.target.closest("button.t");
  if (!button) return;
  const large = dialog.querySelector("i");
  large.className = button.className;
  large.style.cssText = button.style.cssText;
  dialog.querySelector("p").textContent = button.getAttribute("aria-label");
  dialog.showModal();
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});
