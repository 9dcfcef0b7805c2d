package status

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// Each testdata/NAME.json is rendered as NAME.txt. BLOCKFERRY_WRITE=1 writes
// the latter.
func TestText(t *testing.T) {
	files, _ := filepath.Glob("testdata/*.json")
	if len(files) < 4 {
		t.Fatalf("only %d documents", len(files))
	}
	for _, f := range files {
		content, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		var d Document
		strict := json.NewDecoder(bytes.NewReader(content))
		strict.DisallowUnknownFields()
		if err := strict.Decode(&d); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		var got bytes.Buffer
		if err := WriteText(&got, &d); err != nil {
			t.Fatal(err)
		}
		golden := strings.TrimSuffix(f, ".json") + ".txt"
		if os.Getenv("BLOCKFERRY_WRITE") == "1" {
			if err := os.WriteFile(golden, got.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if got.String() != string(want) {
			t.Errorf("%s: got\n%s\nwant\n%s", f, got.String(), want)
		}
	}
}

// What is not known is absent from JSON, and every key is in kebab-case.
func TestJSONHasNoSentinels(t *testing.T) {
	b, _ := json.Marshal(Document{Volumes: []Volume{{Name: "data", Replicas: []Replica{{Name: "ebs"}}}}})
	for _, absent := range []string{"behind", "eta", "position", "last-cut", "written", "size-bytes", "done", "null"} {
		if strings.Contains(string(b), absent) {
			t.Errorf("'%s' is in %s", absent, b)
		}
	}
	kebab := regexp.MustCompile(`^[a-z]+(-[a-z]+)*$`)
	for _, typ := range []reflect.Type{reflect.TypeFor[Document](), reflect.TypeFor[Volume](), reflect.TypeFor[Lease](), reflect.TypeFor[Kept](), reflect.TypeFor[Replica](), reflect.TypeFor[Cut](), reflect.TypeFor[Position]()} {
		for i := range typ.NumField() {
			key, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
			if !kebab.MatchString(key) {
				t.Errorf("%s.%s: key %q", typ, typ.Field(i).Name, key)
			}
		}
	}
}

// A replica that is no seconds and no bytes behind says so: a zero is a
// value.
func TestZeroBehindIsSaid(t *testing.T) {
	zero, none := 0.0, uint64(0)
	d := Document{Volumes: []Volume{{Name: "data", Replicas: []Replica{{Name: "ebs", Connection: "Connected", BehindSeconds: &zero, BehindBytes: &none}}}}}
	var b bytes.Buffer
	_ = WriteText(&b, &d)
	if !strings.Contains(b.String(), "behind:0ms behind-bytes:0B") {
		t.Error(b.String())
	}
	js, _ := json.Marshal(d)
	if !strings.Contains(string(js), `"behind-seconds":0,"behind-bytes":0`) {
		t.Errorf("%s", js)
	}
}
