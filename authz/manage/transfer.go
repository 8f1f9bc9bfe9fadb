package manage

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

const ndjson = "application/x-ndjson"

// transferRoutes are those by which keys come and go in numbers.
func (h *handler) transferRoutes(api huma.API, keys string) {
	route(h, api, http.MethodPost, keys+":import", "importKeys", "Import keys whose secrets their holders have already", admin.ImportInput{}, h.importKeys, 200)
	imports := api.OpenAPI().Paths[keys+":import"].Post
	imports.Description = "One JSON object a line, at most 500 in 1 MiB: all of them, or none. To repeat it does no harm."
	body := imports.RequestBody
	body.Content[ndjson] = body.Content["application/json"] // the schema of each line

	route(h, api, http.MethodGet, keys+":export", "exportKeys", "Export what is known of the keys, without secrets and digests, the oldest first: one JSON object a line", nil, h.exportKeys)
	record := api.OpenAPI().Components.Schemas.Schema(reflect.TypeFor[admin.KeyRecord](), true, "")
	api.OpenAPI().Paths[keys+":export"].Get.Responses["200"].Content = map[string]*huma.MediaType{ndjson: {Schema: record}}
}

type keyImport struct {
	InstanceID string `path:"instanceId"`
	DryRun     yesNo  `query:"dryRun" doc:"true: judge everything, and keep nothing."`
	FirstRow   number `query:"firstRow" doc:"How the report names the first line. By default 1."`
}

// An ImportReport says what became of a batch of keys.
type ImportReport struct {
	Done     bool          `json:"done" doc:"Every row is imported or was there before. Otherwise nothing was."`
	DryRun   bool          `json:"dryRun,omitempty" doc:"Nothing was kept: this is what would be."`
	Imported int           `json:"imported"`
	Existing int           `json:"existing" doc:"Rows whose secret a key of the instance has already."`
	Refused  int           `json:"refused"`
	Rows     []ImportedRow `json:"rows" nullable:"false"`
}

// An ImportedRow says what became of one row.
type ImportedRow struct {
	Row    int                `json:"row"`
	Status admin.ImportStatus `json:"status" enum:"imported,existing,refused,held" doc:"held: nothing is wrong with it, but with another row of the batch."`
	KeyID  apikey.ID          `json:"keyId,omitzero" format:"uuid"`
	Errors []Detail           `json:"errors,omitempty" nullable:"false" doc:"Why it was refused: all that is wrong."`
}

func (h *handler) importKeys(ctx context.Context, c *call, in *keyImport) (*out[ImportReport], error) {
	if in.DryRun != "" && in.DryRun != "true" && in.DryRun != "false" {
		return nil, apikey.Invalid("dryRun", "must be true or false")
	}
	dryRun, first := in.DryRun == "true", 1
	if in.FirstRow != "" {
		var err error
		if first, err = strconv.Atoi(string(in.FirstRow)); err != nil || first < 1 || first > 1<<40 {
			return nil, apikey.Invalid("firstRow", "must be a whole number from 1")
		}
	}
	data, err := readDataAs(c.w, c.r, ndjson, "application/json")
	if err != nil {
		return nil, err
	}
	rows, err := importRows(data, first)
	if err != nil {
		return nil, err
	}
	done, err := h.svc.ImportKeys(ctx, c.Caller, in.InstanceID, rows, dryRun)
	if err != nil {
		return nil, err
	}
	answer := &out[ImportReport]{Status: http.StatusOK, Body: ImportReport{Done: done.Done, DryRun: dryRun, Rows: make([]ImportedRow, len(done.Rows))}}
	report, refusal := &answer.Body, ""
	for i, row := range done.Rows {
		to := &report.Rows[i]
		to.Row, to.Status = row.Number, row.Status
		switch row.Status {
		case admin.RowImported:
			report.Imported++
		case admin.RowExisting:
			report.Existing++
		case admin.RowRefused:
			report.Refused++
			var status int
			if to.Errors, status = detailsOf(row.Err); refusal == "" && slices.Contains(refusals, status) {
				refusal = to.Errors[0].Code
			}
		}
		if !dryRun || row.Status == admin.RowExisting {
			to.KeyID = row.KeyID // that of a dry run is nobody's
		}
	}
	if report.Imported > 0 && !dryRun {
		answer.Status = http.StatusCreated
	}
	if refusal != "" && !dryRun {
		h.svc.Refused(ctx, c.Caller, "", refusal)
	}
	return answer, nil
}

// importRows reads the lines of a batch; blank ones count, and say nothing.
func importRows(data []byte, first int) ([]admin.ImportRow, error) {
	var rows []admin.ImportRow
	for line := range bytes.Lines(data) {
		number := first
		first++
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		if len(rows) == admin.MaxImport {
			return nil, apikey.Invalid("", fmt.Sprintf("has more than %d rows: import them in several batches", admin.MaxImport))
		}
		row := admin.ImportRow{Number: number}
		row.Bad = decode(line, &row.Input)
		rows = append(rows, row)
	}
	return rows, nil
}

// detailsOf says all that is wrong with a row, and what the status would be if it were all.
func detailsOf(err error) (details []Detail, status int) {
	if many, ok := err.(interface{ Unwrap() []error }); ok { // all of it, not the first
		for _, one := range many.Unwrap() {
			more, s := detailsOf(one)
			details = append(details, more...)
			status = max(status, s)
		}
		return details, status
	}
	f := statusOf(err)
	said := f.ErrorBody.Error
	return []Detail{{said.Code, said.Message, said.Target}}, f.status
}

func (h *handler) exportKeys(ctx context.Context, c *call, in *atInstance) (*out[func(huma.Context)], error) {
	// The first page is read before the answer begins, so that what is refused is told as such.
	next, stop := iter.Pull2(func(yield func(*apikey.Key, error) bool) {
		err := h.svc.ExportKeys(ctx, c.Caller, in.InstanceID, func(k *apikey.Key) bool { return yield(k, nil) })
		if err != nil {
			yield(nil, err)
		}
	})
	k, err, more := next()
	if err != nil {
		stop()
		return nil, err
	}
	return ok(func(answer huma.Context) {
		defer stop()
		answer.SetHeader("Content-Type", ndjson)
		w := bufio.NewWriterSize(answer.BodyWriter(), 64<<10)
		var looked time.Time
		for at := time.Now(); more && err == nil; k, err, more = next() {
			if time.Since(looked) >= exportLook {
				// It takes as long as there are keys, longer than other answers may and perhaps than the
				// caller may ask for them: a token that is revoked meanwhile gets no more of them.
				if _, err = h.authenticate(c.r); err != nil {
					break
				}
				looked = time.Now()
				_ = http.NewResponseController(c.w).SetWriteDeadline(looked.Add(answerStall))
			}
			if err = writeJSON(w, admin.RecordOf(k, at)); err != nil {
				break
			}
		}
		if err == nil {
			err = w.Flush()
		}
		if err != nil {
			if ctx.Err() == nil {
				h.logCause(c.r, c.RequestID, statusOf(err))
			}
			panic(http.ErrAbortHandler) // an end that looks like one would hide what is missing
		}
	}), nil
}

const (
	// exportLook is how often an export asks whether its caller still may.
	exportLook = time.Second
	// answerStall is how long a caller may take none of an answer before that ends: a connection is not
	// held for who has stopped reading.
	answerStall = time.Minute
)

// unhurried lets a request take as long as there is data, longer than others may. What it returns is
// called when the answer is made, which then has to be taken.
func (c *call) unhurried() (made func()) {
	control := http.NewResponseController(c.w)
	_ = control.SetWriteDeadline(time.Time{})
	return func() { _ = control.SetWriteDeadline(time.Now().Add(answerStall)) }
}

// ImportOptions say how a client imports.
type ImportOptions struct {
	DryRun bool
	// FromRow is the first line to be sent, from 1; those before are passed over. 0: the first.
	FromRow int
	// Batch is how many lines go at once, all or none, at most 500; 0: 100.
	Batch int
}

const usualBatch = 100

// ImportKeys imports keys from lines of JSON, in batches as the reports are asked for. It ends after a
// batch that was refused, but for a dry run, and after an error. What was reported as done is kept; to
// repeat it does no harm.
func (c *Client) ImportKeys(ctx context.Context, instanceID string, from io.Reader, opts ImportOptions) iter.Seq2[ImportReport, error] {
	return func(yield func(ImportReport, error) bool) {
		lines := bufio.NewReaderSize(from, 64<<10)
		most := opts.Batch
		if most == 0 {
			most = usualBatch
		}
		var batch bytes.Buffer
		first, count := 1, 0 // of the batch
		send := func() bool {
			if len(bytes.TrimSpace(batch.Bytes())) == 0 {
				first, count = first+count, 0
				batch.Reset()
				return true
			}
			query := url.Values{"firstRow": {strconv.Itoa(first)}}
			if opts.DryRun {
				query.Set("dryRun", "true")
			}
			report, err := sendAs[ImportReport](ctx, c, http.MethodPost, instancePath(instanceID, "apiKeys:import"), query, ndjson, bytes.NewReader(batch.Bytes()))
			first, count = first+count, 0
			batch.Reset()
			return yield(report, err) && err == nil && (report.Done || opts.DryRun)
		}
		for number := 1; ; number++ {
			line, err := readLine(lines)
			if err != nil && !errors.Is(err, io.EOF) {
				yield(ImportReport{}, fmt.Errorf("row %d: %w", number, err))
				return
			}
			end := err != nil
			if number < opts.FromRow {
				first = number + 1
			} else if len(line) > 0 {
				if count > 0 && (count == most || batch.Len()+len(line) > maxBody-1) && !send() {
					return
				}
				batch.Write(bytes.TrimRight(line, "\r\n"))
				batch.WriteByte('\n')
				count++
			}
			if end {
				if count > 0 {
					send()
				}
				return
			}
		}
	}
}

var errLongLine = errors.New("the line is longer than 1 MiB")

// readLine reads a line that fits a batch.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case len(line) > maxBody-1:
			return nil, errLongLine
		case !errors.Is(err, bufio.ErrBufferFull):
			return line, err
		}
	}
}

// ExportKeys lists what is known of all keys of an instance, the oldest first, as they arrive. An error ends
// it; without one it is complete.
func (c *Client) ExportKeys(ctx context.Context, instanceID string) iter.Seq2[admin.KeyRecord, error] {
	return func(yield func(admin.KeyRecord, error) bool) {
		resp, err := c.do(ctx, http.MethodGet, instancePath(instanceID, "apiKeys:export"), nil, "", nil)
		if err != nil {
			yield(admin.KeyRecord{}, err)
			return
		}
		defer func() { _ = resp.Body.Close() }()
		for d := json.NewDecoder(resp.Body); ; {
			var k admin.KeyRecord
			err := d.Decode(&k)
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil {
				yield(admin.KeyRecord{}, fmt.Errorf("the export broke off: %w", err))
				return
			}
			if !yield(k, nil) {
				return
			}
		}
	}
}
