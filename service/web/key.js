// The API key. Only this tab keeps it.

const NAME = "ddpm-key";

export const headers = () => {
  const key = sessionStorage.getItem(NAME);
  return key ? { Authorization: `Bearer ${key}` } : {};
};

export const isSet = () => sessionStorage.getItem(NAME) !== null;
export const set = (key) => sessionStorage.setItem(NAME, key);
