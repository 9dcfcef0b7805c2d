package exit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"blockferry/cmd/blockferry/config"
)

// The manual's page is this table. BLOCKFERRY_WRITE=1 writes it.
func TestManualPageIsTheTable(t *testing.T) {
	const page = "../../../docs/exit-codes.md"
	if os.Getenv("BLOCKFERRY_WRITE") == "1" {
		if err := os.WriteFile(page, []byte(Markdown()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != Markdown() {
		t.Errorf("docs/exit-codes.md is not the table; write it with BLOCKFERRY_WRITE=1 go test ./cmd/blockferry/exit")
	}
}

func TestEveryCodeOnceAndItsWireCodeToo(t *testing.T) {
	seenCode, seenWord, seenWire := map[Code]bool{}, map[string]bool{}, map[codes.Code]bool{}
	last := Code(-1)
	for _, row := range Table() {
		if row.Code <= last || seenCode[row.Code] || seenWord[row.Word] || seenWire[row.grpc] || row.Meaning == "" {
			t.Errorf("row %+v", row)
		}
		seenCode[row.Code], seenWord[row.Word], seenWire[row.grpc] = true, true, true
		last = row.Code
	}
}

// A code given in the agent arrives in the command, with the same words.
func TestCodesCrossTheSocket(t *testing.T) {
	for _, row := range Table()[1:] {
		sent := fmt.Errorf("volume 'data': %w", Errorf(row.Code, "the reason"))
		got := FromWire(ToWire(sent))
		if Of(got) != row.Code || got.Error() != sent.Error() {
			t.Errorf("%s: arrived as %d %q", row.Word, Of(got), got)
		}
	}
}

func TestSwitch(t *testing.T) {
	for _, c := range []struct {
		err  error
		want Code
	}{
		{nil, OK},
		{errors.New("x"), Failed},
		{&config.Error{Message: "x"}, Usage},
		{fmt.Errorf("with context: %w", config.Errors{{Message: "x"}}), Usage},
		{fmt.Errorf("waiting: %w", context.DeadlineExceeded), Timeout},
		{context.Canceled, Interrupted},
		{status.Error(codes.Unavailable, "x"), Unreachable},
		{status.Error(codes.Unknown, "x"), Failed},
		{Errorf(Refused, "x: %w", context.DeadlineExceeded), Refused},
	} {
		if got := Of(c.err); got != c.want {
			t.Errorf("%v: %d, want %d", c.err, got, c.want)
		}
	}
}

func TestJSONError(t *testing.T) {
	var got struct {
		Error struct {
			Code    int    `json:"exit-code"`
			Kind    string `json:"kind"`
			Message string `json:"message"`
		} `json:"error"`
	}
	if err := json.Unmarshal([]byte(JSON(Errorf(Refused, "a \"quoted\"\nreason"))), &got); err != nil {
		t.Fatal(err)
	}
	if got.Error.Code != 3 || got.Error.Kind != "refused" || got.Error.Message != "a \"quoted\"\nreason" {
		t.Errorf("%+v", got)
	}
}
