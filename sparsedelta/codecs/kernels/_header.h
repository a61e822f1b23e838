/* The entries of a safetensors header as the safetensors library writes them: compact JSON without escapes, members in the
 * order of FORMAT §3.2. For any other text the functions return None, and the caller uses a general parser. */

static int skip(Reader *reader, const char *text) {
    size n = (size)strlen(text);
    if (reader->end - reader->at < n || memcmp(reader->at, text, n)) return 0;
    reader->at += n;
    return 1;
}

/* Reads a decimal integer below 10^18. */
static int read_integer(Reader *reader, int64_t *number) {
    const u8 *start = reader->at;
    for (*number = 0; reader->at < reader->end && *reader->at >= '0' && *reader->at <= '9'; reader->at++) {
        if (reader->at - start >= 18) return 0;
        *number = 10 * *number + (*reader->at - '0');
    }
    return reader->at > start && (*start != '0' || reader->at - start == 1);
}

/* Moves to the quote that ends a string. */
static int skip_string(Reader *reader) {
    for (; reader->at < reader->end && *reader->at != '"'; reader->at++)
        if (*reader->at < ' ' || *reader->at == '\\') return 0;
    return reader->at < reader->end;
}

/* Moves over the dtype and shape of an entry. */
static int skip_layout(Reader *reader) {
    int64_t size_;
    if (!skip_string(reader) || !skip(reader, "\",\"shape\":[")) return 0;
    if (skip(reader, "]")) return 1;
    do
        if (!read_integer(reader, &size_)) return 0;
    while (skip(reader, ","));
    return skip(reader, "]");
}

/* Returns the number of a layout, which is new if `known` does not have its text; -1 after an error. */
static int64_t number_of(PyObject *known, const u8 *text, size n) {
    int64_t number = -1;
    PyObject *key = PyBytes_FromStringAndSize((const char *)text, n);
    PyObject *found = key ? PyDict_GetItemWithError(known, key) : NULL;
    if (found)
        number = PyLong_AsLongLong(found);
    else if (key && !PyErr_Occurred()) {
        PyObject *new = PyLong_FromSsize_t(number = PyDict_Size(known));
        if (!new || PyDict_SetItem(known, key, new)) number = -1;
        Py_XDECREF(new);
    }
    Py_XDECREF(key);
    return number;
}

/* Reads the entries of a header from byte `start`. Writes three numbers for each: layout, begin and end. Returns the names, and
 * the text of each layout, from the dtype to the end of the shape; or None. */
static PyObject *read_entries(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    size start;
    if (!PyArg_ParseTuple(args, "O&nO&", in_u8, &b[0], &start, out_i64, &b[1])) return NULL;
    size room = n_items(&b[1]) / 3, n = 0, n_last = 0;
    if (start < 0 || start > b[0].len) return release(b, 2, wrong_sizes());
    const u8 *data = b[0].buf, *last = NULL;
    i64 *row = b[1].buf;
    Reader reader = {data + start, data + b[0].len};
    PyObject *names = PyList_New(0), *layouts = PyDict_New();
    int good = names && layouts;
    for (int more = 1; good && more; n++, row += 3) {
        const u8 *name = reader.at + 1;
        good = n < room && skip(&reader, "\"") && skip_string(&reader);
        const u8 *name_end = reader.at;
        good = good && skip(&reader, "\":{\"dtype\":\"");
        const u8 *layout = reader.at;
        good = good && skip_layout(&reader);
        size n_layout = reader.at - layout;
        int64_t begin, end;
        good = good && skip(&reader, ",\"data_offsets\":[") && read_integer(&reader, &begin) && skip(&reader, ",") &&
               read_integer(&reader, &end) && skip(&reader, "]}");
        if (!good) break;
        if (last && n_layout == n_last && !memcmp(last, layout, n_layout))
            row[0] = row[-3];
        else
            row[0] = number_of(layouts, layout, n_layout);
        last = layout, n_last = n_layout;
        row[1] = begin, row[2] = end;
        PyObject *text = PyUnicode_DecodeUTF8((const char *)name, name_end - name, "strict");
        good = row[0] >= 0 && text && !PyList_Append(names, text);
        Py_XDECREF(text);
        more = good && skip(&reader, ",");
    }
    good = good && n == room && skip(&reader, "}");
    while (good && reader.at < reader.end) good = *reader.at++ == ' ';
    PyErr_Clear(); /* the general parser finds the error again */
    PyObject *keys = good ? PyDict_Keys(layouts) : NULL;
    PyObject *result = keys ? PyTuple_Pack(2, names, keys) : good ? NULL : none();
    Py_XDECREF(keys);
    Py_XDECREF(names);
    Py_XDECREF(layouts);
    return release(b, 2, result);
}

/* Writes text that ends with a number; returns its end. */
INLINE u8 *put_text(u8 *out, const char *text, uint64_t number) {
    size n = (size)strlen(text);
    memcpy(out, text, n);
    out += n;
    u8 digits[20], *digit = digits + 20;
    do *--digit = (u8)('0' + number % 10);
    while (number /= 10);
    memcpy(out, digit, digits + 20 - digit);
    return out + (digits + 20 - digit);
}

/* Returns the text of entries: names; text of each layout; number of each entry's layout; where each entry's data ends. None
 * if a name needs an escape. */
static PyObject *put_entries(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    PyObject *names, *layouts;
    if (!PyArg_ParseTuple(args, "O!O!O&O&", &PyList_Type, &names, &PyList_Type, &layouts, in_i64, &b[0], in_i64, &b[1])) return NULL;
    size n = n_items(&b[0]), n_layouts = PyList_Size(layouts), room = 1, used = 0;
    if (PyList_Size(names) != n || n_items(&b[1]) != n) return release(b, 2, wrong_sizes());
    const i64 *layout = b[0].buf, *end = b[1].buf;
    u8 *text = NULL;
    int good = 1;
    int64_t begin = 0;
    for (size i = 0; good && i < n; begin = end[i++]) {
        size n_name, n_layout;
        PyObject *held = layout[i] >= 0 && layout[i] < n_layouts ? PyList_GetItem(layouts, layout[i]) : NULL;
        char *shown = NULL;
        const char *name = PyUnicode_AsUTF8AndSize(PyList_GetItem(names, i), &n_name);
        good = held && name && !PyBytes_AsStringAndSize(held, &shown, &n_layout) && begin >= 0 && end[i] >= begin;
        if (!good) break;
        size needed = used + n_name + n_layout + 100;
        if (needed > room) {
            u8 *more = realloc(text, (size_t)(room = 2 * needed));
            if (!more) { good = 0; break; }
            text = more;
        }
        Reader reader = {(const u8 *)name, (const u8 *)name + n_name};
        good = !skip_string(&reader) && reader.at == reader.end;
        u8 *out = text + used;
        if (i) *out++ = ',';
        *out++ = '"';
        memcpy(out, name, n_name), out += n_name;
        memcpy(out, "\":{\"dtype\":\"", 12), out += 12;
        memcpy(out, shown, n_layout), out += n_layout;
        out = put_text(put_text(out, ",\"data_offsets\":[", (uint64_t)begin), ",", (uint64_t)end[i]);
        memcpy(out, "]}", 2), out += 2;
        used = out - text;
    }
    PyErr_Clear();
    PyObject *result = good ? PyBytes_FromStringAndSize((const char *)text, used) : none();
    free(text);
    return release(b, 2, result);
}
